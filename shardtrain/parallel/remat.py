"""What the backward pass recomputes, by name.

Values that wait in the memory of the host (`name:offload`) were compiled for TPU and GPU. On the CPU backend they cannot run:
its devices list a `pinned_host` memory, but JAX 0.12 lowers a `device_put` into it to nothing there, and given the
`annotate_device_placement` calls of a GPU's lowering, XLA's CPU compiler takes them out: what it makes has one memory space
and the gradients of saving the value, bit for bit. Held by tests/unit/parallel/test_remat_offload.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from shardtrain.errors import ConfigError, ShardTrainError
from shardtrain.mesh import device_of
from shardtrain.sharding import context

GATHERED = "gathered"  # weights that `gather` made whole: never saved, gathered again in the backward
REDUCED = "reduced"  # results of a collective of the forward: replaying them would send them again
EXCHANGED = "exchanged"  # tokens at their experts, and back: as `REDUCED`, unless a policy says otherwise
LAYER_INPUT = "layer_input"  # what a stack gives each layer
POLICIES = ("none", "dots", "full")
OFFLOAD, AGAIN = "offload", "again"
HOSTED = f"{LAYER_INPUT}:{OFFLOAD}"  # as `full`, and even the inputs of layers are elsewhere


# Moving and converting values is cheap; saving what it makes of a gathered weight would keep the weight.
_MOVES = frozenset(
    [
        "all_gather",
        "broadcast_in_dim",
        "bitcast_convert_type",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "dynamic_slice",
        "expand_dims",
        "pad",
        "pcast",
        "pvary",
        "reshape",
        "rev",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    ]
)


def _all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    if primitive.name == "name":
        return params["name"] != GATHERED
    if primitive.name == "custom_vjp_call":
        return not _gathers(params["call_jaxpr"].jaxpr)
    return primitive.name not in _MOVES


def _gathers(jaxpr: Any) -> bool:
    """Whether a function is a gather of weights (see `parallel/fsdp.py`), which hides its primitives."""
    return _contains(jaxpr, "all_gather")


def uses_remat(jaxpr: Any) -> bool:
    """Whether a traced function has a `jax.checkpoint` somewhere inside."""
    return _contains(jaxpr, "checkpoint", "remat2")


def _contains(jaxpr: Any, *names: str) -> bool:
    for equation in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for v in equation.params.values()]
        if equation.primitive.name in names or any(_contains(j, *names) for j in inner if hasattr(j, "eqns")):
            return True
    return False


def policy(name: str) -> Callable[..., bool]:
    """A `jax.checkpoint` policy.

    `none`: save everything but gathered weights. `dots`: save matrix products without a batch dim.
    `full`: save only the input of the block and what came out of a collective.
    `a,b`: as `full`, and the values that the model named `a` and `b` (our blocks name `qkv`, `attention_out`, `mlp_up`; stacks
    `layer_input`, which is saved in any case). `a,b:offload`: as that, and `b` waits for the backward in the memory of the host.
    `exchanged:again`: what experts were sent is sent again in the backward, 6 exchanges of tokens a layer for 4.

    Raises:
        ConfigError: a list of nothing, another word after the colon, `offload` for devices that have no other memory.
    """
    policies = jax.checkpoint_policies
    if name == "none":
        return _all_but_weights
    if name == "dots":
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(REDUCED, EXCHANGED)
        )
    if name == "full":
        return policies.save_only_these_names(REDUCED, EXCHANGED)
    kept = [[word.strip() for word in part.split(":")] for part in name.split(",") if part.strip()]
    ways = lambda name: ([], [OFFLOAD], [AGAIN]) if name == EXCHANGED else ([], [OFFLOAD])  # noqa: E731
    wrong = any(words[1:] not in ways(words[0]) or not words[0] for words in kept)
    if wrong or len({REDUCED, *(words[0] for words in kept)}) <= len(kept):
        raise ConfigError(
            f"'{name}'",
            where="remat",
            why=f"each name once, and either saved or offloaded; {EXCHANGED}:{AGAIN} alone is neither",
            fix=f"name, or name:{OFFLOAD}, with commas between, such as qkv,mlp_up:{OFFLOAD}",
        )
    if not kept:
        raise ConfigError(
            f"remat policy '{name}' names nothing",
            where="remat",
            fix=f"one of {', '.join(POLICIES)}, or names of values such as qkv,mlp_up",
        )
    saved, offloaded = ([words[0] for words in kept if words[1:] == way] for way in ([], [OFFLOAD]))
    saved += [REDUCED, *([] if any(words[0] == EXCHANGED for words in kept) else [EXCHANGED])]
    if not offloaded:
        return policies.save_only_these_names(*saved)
    _check_host(name)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


def _check_host(name: str) -> None:
    layout = context.current()
    if layout is not None and layout.mesh is not None and device_of(layout.mesh).platform == "cpu":
        raise ConfigError(
            f"'{name}', and CPU devices are in the memory of the host",
            where="remat",
            why="the CPU compiler drops the transfer, so it would save nothing and say nothing",
            fix=f"'{name.replace(f':{OFFLOAD}', '')}' here; offload on GPU or TPU",
        )


def _unbatched(size: int, *_: Any) -> tuple[Any, Any]:
    raise ShardTrainError(
        f"a collective of the model's own, in a jax.vmap over {size}",
        where="jax.vmap",
        why="attention over a divided sequence, and blocks of a divided stream, send what they hold by hand, and not batched",
        fix="one more dim of the batch in place of the vmap, or jax.lax.map",
    )


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """A call that remat policies do not look into: its results may be saved, nothing inside is.

    For the forward of a `custom_vjp`, which is neither batched nor differentiated. A nested `shard_map` needs it in any case:
    what a policy saves inside of one has no sharding that XLA accepts.
    """
    call = jax.custom_batching.custom_vmap(function)
    call.def_vmap(_unbatched)
    return call


def remat(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` under the named policy."""
    return jax.checkpoint(function, policy=policy(name))


def _with_named_input(body: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
    def named(x: Any, layer: Any) -> tuple[Any, Any]:
        return body(jax.tree.map(lambda leaf: checkpoint_name(leaf, LAYER_INPUT), x), layer)

    return named


def over_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], x: Any, layers: Any, name: str
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `body` under the named policy. A loop keeps forward and backward apart; one layer gets none, since XLA
    would unroll it, and barriers, since XLA would merge what the backward runs again with the forward.
    """
    if LAYER_INPUT in name:
        body = _with_named_input(body)
    if jax.tree.leaves(layers)[0].shape[0] > 1:
        return jax.lax.scan(jax.checkpoint(body, policy=policy(name), prevent_cse=False), x, layers)
    x, made = remat(body, name)(x, jax.tree.map(lambda leaf: leaf[0], layers))
    return x, jax.tree.map(lambda leaf: leaf[None], made)
