"""Text from a language model, one token at a time, with cached keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import ConfigError
from shardtrain.models.language import LanguageModel


def generate(
    model: LanguageModel,
    prompt: Any,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    stop: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue a prompt. Compiled once per model config, shape of the prompt and number of tokens.

    Args:
        model: as `plan.model(state)` gives it, on any mesh.
        prompt: token ids [length] or [batch, length], at least one.
        tokens: how many to add.
        temperature: 0 takes the likeliest token.
        top_k: choose among the k likeliest; 0 among all.
        stop: a token after which only itself follows.
        seed: of the choices.

    Returns:
        int32 [batch, length + tokens] (or without the batch), prompt included.

    Raises:
        ConfigError: no prompt, ids outside the vocabulary, more positions than the model has, or a
            setting below 0.
    """
    ids = np.atleast_2d(np.asarray(prompt, np.int32))
    _check(model, ids, tokens, temperature, top_k)
    if tokens == 0:
        return np.asarray(prompt, np.int32)
    graph, state = nnx.split(model)
    out = _run(
        graph,
        tokens,
        min(top_k, model.config.vocab),
        temperature == 0,
        _mesh(state),
        state,
        ids,
        np.float32(temperature),
        np.int32(-1 if stop is None else stop),
        jax.random.key_data(jax.random.key(seed)),
    )
    full = np.concatenate([ids, np.asarray(out)], 1)
    return full[0] if np.ndim(prompt) == 1 else full


def _check(model: LanguageModel, ids: np.ndarray, tokens: int, temperature: float, top_k: int) -> None:
    length, limit, vocab = ids.shape[1], model.config.sequence, model.config.vocab
    if ids.size == 0:
        raise ConfigError("the prompt has no tokens", where="generate", fix="a prompt of at least one token")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ConfigError(
            f"the prompt has ids from {ids.min()} to {ids.max()}, the model's vocabulary has {vocab}",
            where="generate",
            fix="the tokenizer that the model was trained with",
        )
    for name, value in (("tokens", tokens), ("temperature", temperature), ("top_k", top_k)):
        if value < 0:
            raise ConfigError(f"{name} = {value}", where="generate", fix="0 or more")
    if length + tokens > limit:
        raise ConfigError(
            f"{length} tokens of prompt and {tokens} new ones, the model has {limit} positions",
            where="generate",
            fix=f"at most {max(0, limit - length)} new tokens, or a shorter prompt",
        )


def _mesh(state: Any) -> Any:
    """The mesh that the parameters live on, if any."""
    sharding = getattr(jax.tree.leaves(state)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    graph: Any,
    tokens: int,
    top_k: int,
    greedy: bool,
    mesh: Any,
    state: Any,
    ids: jax.Array,
    temperature: jax.Array,
    stop: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Prefill over the prompt, then one token per step of a scan; new tokens [batch, tokens]."""
    model = nnx.merge(graph, state)
    batch, length = ids.shape

    def pick(x_BD: jax.Array, key: jax.Array, before: jax.Array) -> jax.Array:
        logits = model.logits(x_BD[:, None])[:, 0]
        if top_k:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        token = logits.argmax(-1) if greedy else jax.random.categorical(key, logits / temperature)
        return jnp.where(before == stop, stop, token).astype(jnp.int32)

    x, cache = model.forward(ids, cache=model.empty_cache(batch, length + tokens))
    keys = jax.random.split(jax.random.wrap_key_data(key), tokens)
    first = pick(x[:, -1], keys[0], jnp.full((batch,), -2))

    def body(carry: Any, step: Any) -> tuple[Any, jax.Array]:
        token, cache = carry
        key, position = step
        x, cache = model.forward(token[:, None], cache=cache, position=position)
        return (pick(x[:, 0], key, token), cache), token

    (last, _), rest = jax.lax.scan(body, (first, cache), (keys[1:], length + jnp.arange(tokens - 1)))
    out = jnp.concatenate([rest.T, last[:, None]], 1)
    # Whole on every process, wherever the parameters are.
    return (
        out if mesh is None else jax.lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec()))
    )
