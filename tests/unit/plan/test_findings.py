"""Faults that users write, each planted in a small model: the audit names its kind and its line, and is silent on the
sound version of the same model.

`line("name")` is the line of this file that ends in `# name`: where the fault stands.
"""

import gzip
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain.plan import aot

ROWS, TIME, WIDTH, VOCAB = 64, 16, 256, 1024
HERE = pathlib.Path(__file__)
sys.path.insert(0, str(HERE.parent / "findings_programs"))
import planted  # noqa: E402

MLP_AXES = {"up": ("embed", "mlp"), "out": ("mlp", "embed")}


def line(mark, file=HERE):
    found = [n for n, text in enumerate(file.read_text().splitlines(), 1) if text.endswith(f"# {mark}")]
    assert len(found) == 1, mark
    return f"{file}:{found[0]}"


def weights(**shapes):
    """`init(key)` of a plain model."""
    return lambda key: {
        name: 0.02 * jax.random.normal(jax.random.fold_in(key, n), shape)
        for n, (name, shape) in enumerate(shapes.items())
    }


def mean_square(model, batch):
    return jnp.square(model(batch["x"])).mean()


def make(apply, axes=None, loss=mean_square, mesh=None, rules="tensor", batch=None, optimizer=None, **more):
    shapes = more.pop("shapes", {"up": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)})
    return st.plan(
        (weights(**shapes), apply),
        loss,
        optimizer or optax.adam(1e-3),
        batch=batch or st.batch_spec(x=(ROWS, TIME, WIDTH)),
        mesh=st.make_mesh(**(mesh or {"tensor": 8})),
        rules=rules,
        annotations=st.annotate(axes) if axes else None,
        **more,
    )


def found(step, kind):
    return [f for f in st.audit(step).findings if f.kind == kind]


def only(step, kind):
    """The one finding of this kind."""
    (one,) = found(step, kind)
    return one


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["out"]


@pytest.fixture(scope="module")
def sound():
    """Steps without a fault."""
    return {
        "tensor": make(mlp, MLP_AXES).compile(),
        "data": make(mlp, mesh={"data": 8}, rules="data", microbatches=4).compile(),
    }


def test_sound_steps_have_no_findings(sound):
    """No false alarm. The fault in mind: a check that fires on what our own presets do."""
    for name, step in sound.items():
        assert not st.audit(step).findings, name


# --- tensor ----------------------------------------------------------------------------------------------


def fused_attention(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)  # fused split
    return (jnp.tanh(q * k) * v) @ p["out"]


def apart_attention(p, x):
    h = jnp.einsum("btd,dke->btke", x, p["qkv"])
    return (jnp.tanh(h[:, :, 0] * h[:, :, 1]) * h[:, :, 2]) @ p["out"]


def test_split_of_a_fused_kernel():
    """q, k and v split from one divided dim move between devices; from a dim of three they do not. Failed once: one
    finding for every piece that moved."""
    axes = {"qkv": ("embed", "heads"), "out": ("heads", "embed")}
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
    one = only(make(fused_attention, axes, shapes=shapes).compile(), "needless-permute")
    assert one.source == line("fused split") and one.severity == "warning"
    axes = {"qkv": ("embed", None, "heads"), "out": ("heads", "embed")}
    shapes = {"qkv": (WIDTH, 3, WIDTH), "out": (WIDTH, WIDTH)}
    assert not st.audit(make(apart_attention, axes, shapes=shapes).compile()).findings


def test_roll_over_a_divided_dim(sound):
    """Along the sequence, which nobody divides, it costs nothing. Failed once: neighbours exchange one column, fewer
    bytes than were looked at."""

    def rolled(p, x):
        h = jnp.tanh(x @ p["up"])
        return (h + jnp.roll(h, shift, axis=axis)) @ p["out"]  # roll

    shift, axis = 1, -1
    one = only(make(rolled, MLP_AXES).compile(), "needless-permute")
    assert one.source == line("roll") and one.severity == "note"
    shift = WIDTH // 2
    many = found(make(rolled, MLP_AXES).compile(), "needless-permute")
    assert (line("roll"), "warning") in {(f.source, f.severity) for f in many}
    axis = 1
    assert not st.audit(make(rolled, MLP_AXES).compile()).findings


def test_constraint_that_does_not_divide():
    """Refused when the plan is made, before anything is compiled, with the user's line. Failed once: it was seen only
    when the step was traced, and no line was said."""

    def padded(p, x):
        h = jnp.pad(jnp.tanh(x @ p["up"]), ((0, 0), (0, 0), (0, extra)))
        return st.constrain(h, "batch", None, "mlp")  # indivisible

    extra = 2
    with pytest.raises(
        st.ShardingError, match=r"'mlp' = 258 is not divisible by 8 \(mesh tensor=8\)"
    ) as caught:
        make(padded, MLP_AXES)
    assert caught.value.where.startswith(f"{line('indivisible')}: constrain(") and "try:" in str(caught.value)
    extra = 8
    make(padded, MLP_AXES)


LANGUAGE = {
    "table": ("vocab", "embed"),
    "up": ("embed", "mlp"),
    "out": ("mlp", "embed"),
    "head": ("embed", "vocab"),
}
LANGUAGE_SHAPES = {
    "table": (VOCAB, WIDTH),
    "up": (WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "head": (WIDTH, VOCAB),
}
TOKENS = st.batch_spec(tokens=((ROWS, TIME), "int32"))


def language(p, tokens):
    x = p["table"][tokens]  # table
    return mlp(p, x) @ p["head"]  # head


def likelihood(model, batch):
    logits = st.constrain(model(batch["tokens"]), "batch", None, "vocab")
    picked = jnp.take_along_axis(logits, batch["tokens"][..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).mean()


def test_replicated_embedding():
    """A table whose rows no rule divides. Failed once when only half of a model counted as large."""
    more = dict(shapes=LANGUAGE_SHAPES, loss=likelihood, batch=TOKENS)
    one = only(
        make(language, {**LANGUAGE, "table": (None, "embed")}, **more).compile(), "replicated-parameter"
    )
    assert (one.path, one.source) == ("table", line("table")) and "1.0 MiB" in one.message
    assert not st.audit(make(language, LANGUAGE, **more).compile()).findings


def test_gathered_logits():
    """A softmax that asks for the whole vocabulary on each device. Left to itself the partitioner may gather the head
    instead: the same fault. Failed once when every array passed for a weight."""

    def whole(model, batch):
        logits = st.constrain(model(batch["tokens"]), "batch", None, None)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][..., None], -1).mean()

    def divided(p, tokens):
        return st.constrain(mlp(p, p["table"][tokens]) @ p["head"], "batch", None, "vocab")  # logits

    more = dict(shapes=LANGUAGE_SHAPES, loss=whole, batch=TOKENS)
    one = only(make(divided, LANGUAGE, **more).compile(), "gathered-logits")
    assert one.source == line("logits") and one.severity == "error"
    one = only(make(language, LANGUAGE, **more).compile(), "gathered-weight")
    assert one.path == "head" and one.source.startswith(f"{HERE}:") and "1.0 MiB" in one.message


# --- state ------------------------------------------------------------------------------------------------


def test_optimizer_state_that_is_not_divided(sound):
    """By rules of its own, or because a transform joins all leaves into one. Failed once for the latter, which belongs
    to no parameter."""

    def apply(p, x):
        return jnp.tanh(x @ p["up"]) @ p["out"]  # first use

    rules = st.rules.tensor.override(optimizer={"mlp": None})
    one = only(make(apply, MLP_AXES, rules=rules).compile(), "optimizer-less-divided")
    assert one.source == line("first use") and one.path == "opt_state/0/mu/out and 3 more"
    rules = st.rules.fsdp.override(optimizer={"*": None})
    spread = make(apply, MLP_AXES, mesh={"fsdp": 8}, rules=rules)  # once an error inside of shard_map
    assert only(spread.compile(), "optimizer-less-divided").path == "opt_state/0/mu/out and 3 more"
    joined = make(apply, MLP_AXES, optimizer=optax.flatten(optax.adam(1e-3)))
    one = only(joined.compile(), "optimizer-less-divided")
    assert one.path == "opt_state/0/mu and 1 more" and "optax.flatten" in one.fix


@pytest.mark.parametrize(("gib", "kinds"), [(90, ["does-not-fit"]), (60, [])])
def test_more_memory_than_the_chip_has(gib, kinds):
    """The GPU compiler says nothing: Llama 8B at 101 GiB on h100 was once an audit without findings."""
    from shardtrain.plan.findings.compiler import does_not_fit

    step = types.SimpleNamespace(target=st.Target("h100:1x8"), memory=lambda: {"peak": gib * 2**30})
    assert [f.kind for f in does_not_fit(step)] == kinds


def test_donation_that_failed():
    """A function that is given the state and returns it in another dtype. Failed once: buffers that found no output were
    named, not the leaves that changed; once more when numbers of parameters were taken for leaves."""
    plan = make(mlp, MLP_AXES, shapes={"up": (WIDTH, 4 * WIDTH), "out": (4 * WIDTH, WIDTH)})

    def change(dtype):
        def function(state, batch):
            del batch
            return state.replace(params=jax.tree.map(lambda x: (x * 2).astype(dtype), state.params))

        return plan.jit(function, donate=True)

    one = only(change(jnp.bfloat16), "donation-failed")
    assert one.path == "params/out and 1 more" and "256.0 KiB" in one.message
    assert not found(change(jnp.float32), "donation-failed")

    def part(state, batch):  # most of the state is not used at all
        del batch
        return {"up": state.params["up"].astype(jnp.bfloat16), "out": state.params["out"] * 2}

    assert only(plan.jit(part, donate=True), "donation-failed").path == "params/up"


class Layers:
    """A stack of four layers that the model scans itself."""

    def __init__(self, gathers):
        self.gathers = gathers

    def __call__(self, p, x):
        def layer(x, w):
            w = st.gather(w, "stack") if self.gathers else w
            return jnp.tanh(x @ w["up"]), None

        return jax.lax.scan(layer, x, p["stack"])[0]  # scan


def test_stack_gathered_whole():
    """A scan over layers under fsdp, with and without the one line. Failed once: it named the line of the first use inside
    the layer."""
    make_stack = lambda gathers: st.plan(
        (lambda key: {"stack": weights(up=(4, WIDTH, WIDTH))(key)}, Layers(gathers)),
        mean_square,
        optax.adam(1e-3),
        batch=st.batch_spec(x=(ROWS, TIME, WIDTH)),
        mesh=st.make_mesh(fsdp=8),
        rules="fsdp",
    )
    one = only(make_stack(False).compile(), "stack-gathered-whole")
    assert one.source == line("scan") and 'st.gather(layer, "stack")' in one.fix and "1.0 MiB" in one.message
    assert not st.audit(make_stack(True).compile()).findings


@pytest.mark.parametrize("rules", ["fsdp_tensor", "fsdp_tensor_sequence"])
def test_nothing_to_say_of_our_own_model(rules):
    """Failed once: the gradient of a residual stream that is summed over tensor per layer, and then over rows into the
    positions' gradient, was taken for a gradient that is reduced per microbatch."""
    from shardtrain.models import GPTConfig, build_model, language_model_loss

    shape = (32, 128)
    plan = st.plan(
        lambda rngs: build_model(GPTConfig(), rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=st.make_mesh(data=2, fsdp=2, tensor=2),
        rules=rules,
        microbatches=2,
    )
    assert {f.severity for f in st.audit(plan.compile()).findings} <= {"note"}


# --- loops --------------------------------------------------------------------------------------------------


def by_hand(plan, outside):
    """A step of a user's own, four microbatches in a scan, sharding left to the partitioner."""

    def loss(p, x):
        return jnp.square(jnp.tanh(x @ p["up"]) @ p["out"]).mean()  # by hand

    def step(state, batch):
        params = state.params
        xs = jax.lax.with_sharding_constraint(batch["x"], NamedSharding(plan.mesh, P("data")))
        xs = xs.reshape(8, 4, ROWS // 32, TIME, WIDTH)
        if outside:  # each device adds up its own rows
            total = jax.vmap(lambda x: add_up(params, x))(xs)
            total = jax.tree.map(lambda g: g.sum(0), total)
        else:
            total = add_up(params, xs.swapaxes(0, 1).reshape(4, -1, TIME, WIDTH))
        return state.replace(params=jax.tree.map(lambda a, b: a - 0.1 * b, params, total))

    def add_up(params, xs):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(
            lambda t, x: (jax.tree.map(jnp.add, t, jax.grad(loss)(params, x)), None), zeros, xs
        )[0]

    return plan.jit(step)


def test_reduction_inside_the_microbatch_loop():
    """A user's own accumulation reduces each microbatch; adding up first reduces once. Failed once when totals
    in the loop's state were not looked for."""
    plan = make(mlp, mesh={"data": 8}, rules="data")
    one = only(by_hand(plan, outside=False), "reduced-in-loop")
    assert one.source == line("by hand") and one.severity == "error" and "reduced 4 times" in one.message
    audit = st.audit(by_hand(plan, outside=True))
    assert not [f for f in audit.findings if f.kind == "reduced-in-loop"]
    assert audit.minimum is None and audit.ratio is None


def accumulated(plan, before):
    """A gradient of one's own over four microbatches, weights divided over fsdp, recomputed in the backward."""

    def step(state, batch):
        def local(up, x):
            @jax.checkpoint
            def loss(w, x):
                w = w if before else jax.lax.all_gather(w, "fsdp", tiled=True)  # each turn
                return jnp.tanh(x @ w).sum()

            w = jax.lax.all_gather(up, "fsdp", tiled=True) if before else up
            turns = lambda total, x: (total + jax.grad(loss)(w, x), None)
            total = jax.lax.scan(turns, jnp.zeros_like(w), x)[0]
            return jax.lax.psum_scatter(total, "fsdp", tiled=True) if before else total

        shards = (P("fsdp"), P(None, "fsdp"))
        mapped = jax.shard_map(local, mesh=plan.mesh, in_specs=shards, out_specs=P("fsdp"), check_vma=False)
        return mapped(state.params["up"], batch["x"].reshape(4, ROWS // 4, TIME, WIDTH))

    return plan.jit(step)


def test_gathered_again_every_turn():
    """A weight that no turn of the loop changes is gathered in each. Failed once when nothing read from the loop's state
    counted as the same."""
    plan = make(mlp, mesh={"fsdp": 8}, rules="fsdp")
    one = only(accumulated(plan, before=False), "repeated-in-loop")
    assert one.source == line("each turn") and one.severity == "warning" and "sent 4 times" in one.message
    assert found(accumulated(plan, before=False), "reduced-in-loop")
    assert not [f for f in st.audit(accumulated(plan, before=True)).findings if f.kind.endswith("in-loop")]


def test_what_fsdp_means_to_repeat_is_a_note():
    """An unrolled model is gathered and reduced for each microbatch, as the minimum says too: no warning. Failed once:
    both were errors on our own step."""
    audit = st.audit(make(mlp, mesh={"fsdp": 8}, rules="fsdp", microbatches=2).compile())
    assert {f.kind for f in audit.findings} == {"reduced-in-loop", "repeated-in-loop"}
    assert {f.severity for f in audit.findings} == {"note"} and not audit.worst("warning")


# --- what is sent -------------------------------------------------------------------------------------------


def test_gathered_batch():
    """Scores between all rows, in a user's own function. Failed once: rows that a weight's dims divide passed for a
    weight."""
    plan = make(mlp, mesh={"data": 8}, rules="data", batch=st.batch_spec(x=(128, WIDTH)))

    def scores(state, batch):
        h = batch["x"] @ state.params["up"]
        return jnp.square(h @ h.T).sum()  # all rows

    def norms(state, batch):
        return jnp.square(batch["x"] @ state.params["up"]).sum()

    one = only(plan.jit(scores), "gathered-batch")
    assert one.source == line("all rows") and one.severity == "error"
    assert not st.audit(plan.jit(norms)).findings


def reduced(plan, scatter):
    """Each device keeps its part of a sum."""

    def local(g):
        if scatter:
            return jax.lax.psum_scatter(g, "data", tiled=True)
        n = g.shape[0] // 8
        return jax.lax.dynamic_slice_in_dim(jax.lax.psum(g, "data"), jax.lax.axis_index("data") * n, n)  # sum

    def step(state, batch):
        mapped = jax.shard_map(local, mesh=plan.mesh, in_specs=P(), out_specs=P("data"), check_vma=False)
        return mapped(state.params["up"] * 2)

    return plan.jit(step)


def test_all_reduce_of_which_a_part_is_kept():
    """`psum` and a slice, where `psum_scatter` sends half. Failed once when the CPU was left out altogether."""
    plan = make(mlp, mesh={"data": 8}, rules="data")
    one = only(reduced(plan, scatter=False), "scatter-would-do")
    assert one.source == line("sum") and one.severity == "warning"
    assert not found(reduced(plan, scatter=True), "scatter-would-do")


def printing(prints):
    def apply(p, x):
        h = jnp.tanh(x @ p["up"])
        if prints:
            jax.debug.print("mean {m}", m=h.mean())  # print
        return h @ p["out"]

    return make(apply, MLP_AXES).compile()


def test_print_of_a_traced_value(sound):
    """The step talks to Python. Failed once: a plan could not be made at all of a loss that prints."""
    one = only(printing(True), "host-transfer")
    assert one.source == line("print") and one.severity == "error"
    assert not st.audit(printing(False)).findings


# --- what the compiler says ---------------------------------------------------------------------------------


def turned(plan, between):
    """A cube from one axis order to another."""

    def step(state, batch):
        cube = st.constrain(jnp.tanh(batch["x"]), "rows", None, None)  # cube
        if between:
            cube = st.constrain(cube, None, "rows", None)
        return 2 * st.constrain(cube, None, "outer", "inner")

    return plan.jit(step, target="cpu:8")


def test_involuntary_replication():
    """The partitioner knows no way from one sharding to another, says so on stderr, and makes the tensor whole. Failed
    once: the warning has no line but a frame's number, and its shardings hold braces of their own."""
    rows = ("data", "fsdp", "tensor")
    rules = st.rules.fsdp_tensor.override(
        activations={"rows": rows, "outer": ("data", "tensor"), "inner": "fsdp"}
    )
    plan = make(
        mlp,
        MLP_AXES,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        rules=rules,
        batch=st.batch_spec(x=(64, 64, 64)),
        shapes={"up": (64, 64), "out": (64, 64)},
    )
    one = only(turned(plan, between=False), "involuntary-replication")
    assert one.source == line("cube") and one.severity == "error"
    assert "f32[8,64,64]" in one.message and "from data+fsdp+tensor . . to . data+tensor fsdp" in one.message
    assert not st.audit(turned(plan, between=True)).findings


# --- as the TPU and GPU compilers show them ----------------------------------------------------------------

CASES = [(name, target) for name, (_, _, targets) in planted.CASES.items() for target in targets]


def check_planted(name, step, sound):
    how, kind, _ = planted.CASES[name]
    one = only(step, kind)
    here = line(how.__name__, planted.HERE).rsplit("/", 1)[-1]
    assert one.source.rsplit("/", 1)[-1] == here, "python findings_programs/planted.py stores the texts anew"
    assert one.severity in ("warning", "error")
    assert not st.audit(sound).findings


@pytest.mark.parametrize(("name", "target"), CASES)
def test_planted_faults_in_stored_programs(name, target, monkeypatch):
    """What the compilers made of each fault, stored. Failed once for a reduction of scanned layers: it is written into a
    stack in the inner loop and added up in the outer one; once more for GPUs, which start and end fusions apart; once for
    TPUs, which take zeros in place of the total in the first turn, and once where they hide the reduction behind a product
    ("hidden"; "loop" is of before our options asked for it)."""

    def stored(fault):
        content = json.loads(gzip.decompress(planted.place(name, target, fault).read_bytes()))

        def compile_for(module, target, mesh, options=None, **more):
            del module, mesh, options, more
            return aot.Program(target, cpu_seconds=0.0, cached=True, **content)

        # Without the compilers: only what they made is needed.
        monkeypatch.setattr(aot, "compile_for", compile_for)
        monkeypatch.setattr(aot, "mesh_for", lambda target, shape: target.mesh(dcn=None, **shape))
        return planted.CASES[name][0](target, fault)

    check_planted(name, stored(True), stored(False))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), CASES)
def test_planted_faults_in_new_programs(name, target):
    """The same, compiled now."""
    how = planted.CASES[name][0]
    check_planted(name, how(target, True), how(target, False))
