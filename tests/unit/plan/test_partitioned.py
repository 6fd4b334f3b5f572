"""Programs partitioned on paper against the same programs compiled: FLOPs, bytes, arguments; and by hand."""

import dataclasses
import math
import re

import optax
import pytest

import shardtrain as st
from shardtrain.models import GPTConfig, LlamaConfig, MoEConfig, build_model, language_model_loss
from shardtrain.plan import partitioned
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.compiled import lower_step
from shardtrain.plan.liveness import live
from shardtrain.plan.paper import Array, Block, Op, Paper, count, trip_count
from shardtrain.plan.partitioned import divide, partition, unavailable

over_tensor = pytest.mark.skipif(bool(unavailable({"tensor": 2})), reason=unavailable({"tensor": 2}))
GPT = GPTConfig(vocab=256, sequence=64, embed=64, layers=4, heads=8, remat="dots")
ONE = dataclasses.replace(GPT, layers=2, remat="full")  # a layer for each of two stages
MOE = MoEConfig(vocab=256, sequence=64, embed=64, layers=2, heads=8, kv_heads=4, expert_mlp=64)
BATCH = st.batch_spec(tokens=((16, 64), "int32"), targets=((16, 64), "int32"), weights=(16, 64))


def planned(name, mesh, model=GPT):
    candidate = Candidate.parse(name)
    factory = lambda rngs: build_model(model, rngs)
    return st.plan(
        factory, language_model_loss, optax.adamw(1e-3), batch=BATCH, mesh=mesh, **candidate.options
    )


def on_paper(name, model=GPT, target="cpu:8"):
    target = st.Target(target)
    return partition(planned(name, target.mesh(**Candidate.parse(name).mesh), model), target)


LAYOUTS = [
    pytest.param("data2-fsdp2-tensor2+x2", GPT, marks=over_tensor),
    pytest.param("data2-tensor4+tensor_sequence", GPT, marks=pytest.mark.slow),
    ("fsdp2-context4", GPT),
    ("stage2-data4+x2", GPT),
    ("stage2-data4+x2", ONE),
    pytest.param("data2-expert2-tensor2", MOE, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "model"), LAYOUTS)
def test_equals_the_compiled_program(name, model):
    """FLOPs to 0.1%, arguments exactly, bytes sent by axis, temporaries roughly.

    Failed once with a stage's branches taken more often than they are, and with a scan of one layer, which XLA unrolls: what only
    the next layer would read is then not computed again.
    """
    paper = on_paper(name, model)
    step = planned(name, st.make_mesh(**Candidate.parse(name).mesh), model).compile()
    assert paper.flops == pytest.approx(step.program().flops, rel=1e-3)
    memory = step.memory()
    assert paper.arguments == memory["arguments"]
    assert paper.temporaries == pytest.approx(memory["temporaries"], rel=0.5)
    sent = lambda found: {
        axis: sum(c.wire_bytes for c in found if c.axis == axis) for axis in {c.axis for c in found}
    }
    ours, theirs = sent(paper.collectives), sent(step.collectives())
    total = sum(theirs.values())
    for axis in {*ours, *theirs}:
        assert ours.get(axis, 0) == pytest.approx(theirs.get(axis, 0), abs=0.01 * total), axis


def test_no_branch_that_nobody_takes():
    """Each branch of a pipeline's program is taken by some stage and left by another: of two equal branches, one never taken, the
    GPU compiler keeps one under the name of either (H100, llama b1, two stages: 1.07% FLOPs too many).

    Failed once: the head written into the ticks after the last forward, which run no head.
    """
    target, layout = st.Target("cpu:8"), Candidate.parse("stage2-data4+x2")
    lowered = lower_step(planned(layout.name, target.mesh(**layout.mesh)), "cpu")
    text = lowered.compiler_ir("stablehlo").operation.get_asm(enable_debug_info=True)
    shares = {(int(a), int(b)) for a, b in re.findall(r"branch_\d+_fun/runs_(\d+)_of_(\d+)", text)}
    assert shares and all(0 < times < of for times, of in shares), shares


@over_tensor
def test_fused_attention_is_counted():
    """On NVIDIA the scores are inside a kernel: half of them under a causal mask, in two products forward and five back.

    The fault in mind: the stand-in's FLOPs not divided over tensor.
    """
    model = dataclasses.replace(GPT, heads=4, remat="none")
    target = st.Target("h100:1x8")
    with_kernel, without = (
        partition(
            st.plan(
                lambda rngs: build_model(model, rngs),
                language_model_loss,
                optax.sgd(1.0),
                batch=BATCH,
                mesh=target.mesh(data=2, tensor=4),
                precision=precision,
            ),
            target,
        )
        for precision in ("bf16", "f32")
    )
    scores = 2 * 8 * 64 * 64 * 64 / 4 * 4  # one product over a device's heads in all layers
    assert without.flops - with_kernel.flops == (2 + 4) * scores - (2 + 5) * scores / 2


@over_tensor
def test_a_thousand_devices():
    """No device is touched, whatever their number: what each computes is a 1,024th of what one would.

    The fault in mind: a mesh of the devices that are here.
    """
    target, batch = (
        st.Target("v5p:8x8x16"),
        st.batch_spec(**{k: ((128, 64), v.dtype) for k, v in BATCH.items()}),
    )
    one, many = (
        partition(
            st.plan(
                lambda rngs: build_model(GPT, rngs),
                language_model_loss,
                optax.sgd(1.0),
                batch=batch,
                mesh=mesh,
            ),
            target,
        )
        for mesh in (st.Target("v5e:1x1").mesh(data=1), target.mesh(data=8, fsdp=16, tensor=8))
    )
    assert many.flops * 1024 == one.flops


@pytest.mark.parametrize(("target", "microbatches"), [("v6e:2x4", 1), ("h100:1x8", 1), ("h100:1x8", 2)])
def test_a_head_is_reduced_before_the_layers_go_back(target, microbatches):
    """Its gradient is a shard when the backward of the layers begins; held over microbatches, it is one after the last. Failed
    once: whole, in float32, during the backward of all layers (7.8 GiB of Llama 405B)."""
    model = LlamaConfig(
        vocab=1024, sequence=64, embed=64, layers=3, heads=4, kv_heads=4, head_dim=16, mlp=128, remat="full"
    )
    target = st.Target(target)
    plan = st.plan(
        lambda rngs: build_model(model, rngs),
        language_model_loss,
        optax.sgd(0.1),
        batch=BATCH,
        mesh=target.mesh(fsdp=8),
        microbatches=microbatches,
        precision="bf16",
    )
    assert plan.late_leaves == ({"head_kernel"} if microbatches == 1 else frozenset())
    paper = divide(lower_step(plan, target.platform).compiler_ir("stablehlo"), dict(plan.mesh.shape))
    size = {n: math.prod(array.shape) for n, array in paper.values.items()}
    (reduced,) = [
        i
        for i, op in enumerate(paper.entry.ops)
        if op.name == "reduce_scatter" and size[op.reads[0]] == 64 * 1024
    ]
    loops = [i for i, op in enumerate(paper.entry.ops) if op.name == "while"]
    assert len(loops) == (2 if microbatches == 1 else 1)  # forward and backward, or over microbatches
    assert (reduced < loops[-1]) == (microbatches == 1)


def test_says_what_is_missing(monkeypatch):
    """The fault in mind: an AttributeError from inside."""
    monkeypatch.setattr(partitioned, "_MISSING", "this jaxlib has no passmanager")
    with pytest.raises(st.errors.CompileError, match="no passmanager"):
        on_paper("data8")


def loop(trips, body, start=0, step=1):
    """`for i in range(start, trips, step)`: numbers 0 to 9 are the loop's own."""
    condition = Block(
        (0,), (Op("constant", (), (1,), number=trips), Op("compare", (0, 1), (2,), compares="LT")), (2,)
    )
    inside = (*body, Op("constant", (), (4,), number=step), Op("add", (3, 4), (5,)))
    return [
        Op("constant", (), (6,), number=start),
        Op("while", (6,), (7,), (condition, Block((3,), inside, (5,)))),
    ]


@pytest.mark.parametrize(
    ("start", "end", "step", "trips"), [(0, 7, 1, 7), (2, 7, 1, 5), (0, 7, 2, 4), (3, 3, 1, 0)]
)
def test_trip_counts(start, end, step, trips):
    """Failed once with the start left out."""
    constant, found = loop(end, (), start, step)
    assert trip_count(found, {constant.makes[0]: start}) == trips


def test_a_collective_in_a_loop_by_hand():
    """2f*X for every run. Failed once with the payload of one run."""
    values = {n: Array("i32", (), 4) for n in range(10)} | {10: Array("f32", (100, 1000), 4)}
    body = (Op("all_reduce", (10,), (11,), axes=("tensor",)),)
    paper = Paper(Block((10,), tuple(loop(6, body)), ()), values, {"data": 2, "tensor": 4})
    (sent,) = count(paper)[1]
    assert (sent.count, sent.axis, sent.loops) == (6, "tensor", (6,))
    assert sent.wire_bytes == 6 * 2 * 3 / 4 * 400_000


def chain(*ops, sizes):
    values = {n: Array("f32", (size,), 4) for n, size in sizes.items()}
    return live(Paper(Block((0,), ops, (max(sizes),)), values, {})).bytes


def test_live_by_hand():
    """A product's result lives until its last reader; fused values take no memory, but for a product.

    Failed once with buffers that were never given up (first), and once with every fused value a buffer (second).
    """
    k = 100_000
    products = [Op("dot_general", (0,), (1,)), Op("dot_general", (1,), (2,)), Op("dot_general", (2,), (3,))]
    assert chain(*products, sizes={0: k, 1: k, 2: 2 * k, 3: k}) == 4 * 3 * k
    fused = [Op("dot_general", (0,), (1,)), Op("exponential", (1,), (2,)), Op("add", (2, 1), (3,))]
    assert chain(*fused, sizes={n: k for n in range(4)}) == 4 * k
    assert chain(*fused, Op("dot_general", (3,), (4,)), sizes={n: k for n in range(5)}) == 4 * 3 * k


def test_what_a_loop_adds_up_is_in_one_place():
    """A product and the sum that it is added to, which the loop carries: two buffers. Failed once with a third for the new sum:
    the head's gradient of a loss in chunks three times in float32."""
    k = 100_000
    arrays = {n: Array("i32", (), 4) for n in range(10)}
    arrays |= {n: Array("f32", (k,), 4) for n in range(10, 16)} | {20: Array("f32", (k,), 4)}
    condition = Block(
        (0, 15), (Op("constant", (), (1,), number=3), Op("compare", (0, 1), (2,), compares="LT")), (2,)
    )
    body = Block(
        (3, 11),
        (
            Op("dot_general", (20,), (12,)),
            Op("add", (11, 12), (13,)),
            Op("constant", (), (4,), number=1),
            Op("add", (3, 4), (5,)),
        ),
        (5, 13),
    )
    ops = (
        Op("constant", (), (6,), number=0),
        Op("broadcast_in_dim", (6,), (10,)),
        Op("while", (6, 10), (7, 14), (condition, body)),
    )
    assert live(Paper(Block((20,), ops, (14,)), arrays, {})).bytes == 2 * 4 * k


@pytest.mark.parametrize(("last", "times"), [(64, 2.0), (128, 1.0), (96, 4 / 3), (192, 4 / 3), (16, 1.0)])
def test_lanes_of_a_tpu(last, times):
    """What a forward keeps has its last dim along 128 lanes there, unless most would be empty. Failed once: GPT with heads of 64
    needs 16.5 GB on v5e, and had 12.9 on paper."""
    arrays = {n: Array("f32", (1000, last), 4.0) for n in range(6)} | {6: Array("i1", (), 1.0)}
    loop = lambda read, made: Op("while", (read,), (made,), (Block((4,), (), (6,)), Block((4,), (), (5,))))
    ops = Op("dot_general", (0,), (1,)), loop(1, 2), loop(2, 3)
    paper = Paper(Block((0,), ops, (3,)), arrays, {})
    assert live(paper, "tpu").bytes == pytest.approx(times * live(paper).bytes)
