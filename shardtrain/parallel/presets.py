"""Rules that come with the library. Each is a value; change one with `.override()`.

Every preset also says what three axes do that a mesh may have beside its own, with f = (n-1)/n along each:

expert    divides the experts of a mixture and, as data does, the rows of the batch; other parameters are whole along it.
          Four all-to-alls a layer of f*S*D, for S places of tokens of D bytes; gradients of what is whole are
          all-reduced over it with the batch axes. `infer` knows no names and leaves experts whole, or to fsdp.
          Source: Lepikhin et al., GShard (arXiv 2006.16668).
context   divides every sequence, in blocks too; no parameter. Keys and values of K bytes reach every device: 3f*K a
          layer by a ring or a gather, 2f*(2Q + K)/n by ulysses with queries of Q bytes; gradients are reduced over it
          with the batch axes. With a `_sequence` preset the stream between blocks is divided over context and tensor.
          Source: Liu et al. (arXiv 2310.01889); Jacobs et al. (arXiv 2309.14509).
stage     divides the layers of a stack, at rest and when they run; embedding and head are on every stage, and their
          gradients are all-reduced over it too. 2 m a bytes over each boundary, for m microbatches of a bytes. Needs a
          loss that says its parts (`st.Stages`). Source: Narayanan et al. (arXiv 2104.04473).

slice_fsdp  divides what fsdp does, across the slow network; see `fsdp`.

Beside them fsdp divides all parameters, experts and layers too, in `fsdp`, `fsdp_tensor`, `fsdp_tensor_sequence` and
`infer`; data does in `zero1` and `zero1_tensor`.
"""

from __future__ import annotations

from shardtrain.sharding.rules import ANY, Rules

_NAMES = ("seq", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "expert", "layers")
_WHOLE: dict[str, str | tuple[str, ...] | None] = {
    **{name: None for name in _NAMES},
    "expert": "expert",
    "layers": "stage",
}
_TENSOR = {"mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "vocab": "tensor"}
_DATA, _FSDP, _EXPERT = ("slice", "data"), ("slice_fsdp", "fsdp"), ("expert",)


def _activations(
    batch: tuple[str, ...], tensor: bool, sequence: bool = False
) -> dict[str, str | tuple[str, ...] | None]:
    """Rows over the batch axes and expert; the sequence over context everywhere, with `sequence` between blocks also
    over tensor."""
    seq = ("context", "tensor") if sequence else ("context",)
    whole = {**_WHOLE, "expert": None, "layers": None, "seq": seq, "seq_block": "context"}
    return {"batch": (*batch, *_EXPERT), **whole, **(_TENSOR if tensor else {})}


data = Rules("data", _WHOLE, _activations(_DATA, False))
"""Every device has the whole model; gradients are all-reduced once a step: 2f*X bytes."""

zero1 = Rules("zero1", {**_WHOLE, ANY: "data"}, _activations(_DATA, False), hold=True)
"""As `data`, with float32 parameters and optimizer state divided over the data axis: once a step an all-gather of
the parameters in the wire dtype, a reduce-scatter of the gradients, and each device updates its part: 2f*X bytes,
whatever the number of microbatches. The modern parameter server.
Source: Rajbhandari et al., ZeRO (arXiv 1910.02054), stage 1."""

fsdp = Rules("fsdp", {**_WHOLE, ANY: _FSDP}, _activations((*_DATA, *_FSDP), False))
"""Parameters, gradients and optimizer state divided over fsdp; gathered layer by layer, 3f*X bytes. Over slice_fsdp
too: of w devices within each of s slices each sends 3(s-1)/s * X/w across them and 3(w-1)/w * X within.
Source: ZeRO stage 3."""

tensor = Rules("tensor", {**_WHOLE, **_TENSOR}, _activations(_DATA, True))
"""Heads, MLP columns and vocabulary divided over tensor; activations all-reduced twice a layer and
direction. Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053)."""

tensor_sequence = Rules("tensor_sequence", {**_WHOLE, **_TENSOR}, _activations(_DATA, True, True))
"""`tensor` with the residual stream and its norms divided along the sequence between blocks: an all-gather into each
block and a reduce-scatter out of it, the bytes of the all-reduce, and activations that are n times smaller at rest.
Source: Korthikanti et al. (arXiv 2205.05198)."""

zero1_tensor = Rules("zero1_tensor", {**_WHOLE, **_TENSOR, ANY: "data"}, _activations(_DATA, True), hold=True)
"""`tensor` with parameters and optimizer state also divided over data, as in `zero1`."""

fsdp_tensor = Rules("fsdp_tensor", {**_WHOLE, **_TENSOR, ANY: _FSDP}, _activations((*_DATA, *_FSDP), True))
"""The default: data, fsdp and tensor together. A mesh with only some of the axes gives those alone."""

fsdp_tensor_sequence = Rules(
    "fsdp_tensor_sequence",
    {**_WHOLE, **_TENSOR, ANY: _FSDP},
    _activations((*_DATA, *_FSDP), True, True),
)
"""`fsdp_tensor` with the sequence divided as in `tensor_sequence`."""

infer = Rules("infer", {ANY: _FSDP, "layers": "stage"}, _activations((*_DATA, *_FSDP), False), pick="largest")
"""For models without any metadata: the largest dim that divides, over fsdp. Names are ignored."""

PRESETS: dict[str, Rules] = {
    r.name: r
    for r in (
        data,
        zero1,
        fsdp,
        tensor,
        tensor_sequence,
        zero1_tensor,
        fsdp_tensor,
        fsdp_tensor_sequence,
        infer,
    )
}
