"""A search over few layouts of a tiny model: who is dropped, who wins, what a dead compiler costs."""

import dataclasses
import itertools
import sys

import optax
import pytest

import shardtrain as st
from shardtrain.errors import CompileError
from shardtrain.mesh import CHIPS
from shardtrain.models import GPTConfig, build_model, language_model_loss
from shardtrain.plan import aot
from shardtrain.plan import search as room
from shardtrain.plan.candidates import Candidate, space
from shardtrain.plan.cost import Constants, cost, rooflines
from shardtrain.plan.forecast import forecast, of_program
from shardtrain.plan.minimum import minimum
from shardtrain.plan.paper import Array, Block, Op, Paper, Work, work
from shardtrain.plan.partitioned import partition, unavailable
from shardtrain.plan.search import search
from shardtrain.plan.sketch import PROBES, Sketch, Sketcher, _Rate

over_tensor = pytest.mark.skipif(bool(unavailable({"tensor": 2})), reason=unavailable({"tensor": 2}))
SHAPES = {"tokens": "int32", "targets": "int32", "weights": "float32"}
MODEL = GPTConfig(vocab=256, sequence=32, embed=64, layers=2, heads=4)
TARGET = st.Target("h100:1x8")


def batch(rows):
    return st.batch_spec(tokens=((rows, 32), "int32"), targets=((rows, 32), "int32"), weights=(rows, 32))


def planned(mesh, rows=16, **options):
    return st.plan(
        lambda rngs: build_model(MODEL, rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=batch(rows),
        mesh=mesh,
        **options,
    )


def make(candidate, remat=None):
    return planned(TARGET.mesh(**candidate.mesh), **candidate.options), 1e9


@pytest.fixture(scope="module")
def sketcher():
    papers = tuple(partition(planned(TARGET.one_device, rows), TARGET) for rows in (2, 3))
    return Sketcher(planned(TARGET.one_device, 1), {"": papers}, batch(16), TARGET, Constants())


NAMES = [
    "data8",
    "data8+zero1",
    "fsdp8",
    "data2-fsdp4+x2",
    "fsdp2-tensor4+fsdp_tensor_sequence",
    "data4-stage2+x2",
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=over_tensor) if "tensor" in n else n for n in NAMES])
def test_a_sketch_has_what_a_plan_has(sketcher, name):
    """Leaves, bytes that are sent and bytes of state are the plan's own, without its traces.

    Failed once with gradients that were not counted. Tables here are too small to be exchanged.
    """
    candidate = Candidate.parse(name)
    plan, mesh = make(candidate)[0], TARGET.mesh(**candidate.mesh)
    arranged = sketcher.arranged(mesh, candidate)
    assert {p: (x.spec, x.optimizer, x.gradient) for p, x in arranged.leaves.items()} == {
        p: (x.spec, x.optimizer, x.gradient) for p, x in plan.leaves.items()
    }
    carried = sketcher._traffic(arranged, 16 // plan.groups)
    assert sorted(minimum(arranged, carried).as_json(), key=str) == sorted(minimum(plan).as_json(), key=str)
    gradients = room.forecast(plan, TARGET, paper=partition(plan, TARGET)).bill.gradients
    small = 64  # step, key and cursor
    assert sketcher(candidate).state == pytest.approx(plan.state_bytes + gradients, abs=small)


COSTS = [
    "data8",
    "data8+x2",
    "data4-context2+x2",
    "context8",
    "data2-tensor4",
    "data2-tensor4+fsdp_tensor_sequence",
    "data4-stage2+x4",
]


@pytest.fixture(scope="module")
def long_sketcher():
    papers = {
        kind: tuple(partition(long(TARGET.some_devices(**c.mesh), n, **c.options), TARGET) for n in rows)
        for kind, (c, rows) in PROBES.items()
        if not unavailable(c.mesh)
    }
    fields = long(TARGET.one_device, 16).batch
    return Sketcher(long(TARGET.one_device, 1), papers, fields, TARGET, Constants())


def long(mesh, rows, **options):
    fields = st.batch_spec(**{k: ((rows, 512), t) for k, t in SHAPES.items()})
    factory = lambda rngs: build_model(dataclasses.replace(MODEL, sequence=512), rngs)
    return st.plan(factory, language_model_loss, optax.adamw(1e-3), batch=fields, mesh=mesh, **options)


@pytest.mark.parametrize("name", [pytest.param(n, marks=over_tensor) if "tensor" in n else n for n in COSTS])
def test_a_sketch_costs_what_a_plan_costs(long_sketcher, name):
    """What operations take and wait for, within a fifth of the step partitioned. Failed once with a ring that counted as
    attention of one device, with work that tensor does not divide (by half), and with stages that ran all again.
    """
    candidate = Candidate.parse(name)
    plan = long(TARGET.mesh(**candidate.mesh), 16, **candidate.options)
    found = forecast(plan, TARGET, paper=partition(plan, TARGET)).cost
    sketched = long_sketcher(candidate).cost
    assert sketched.compute + sketched.hbm == pytest.approx(found.compute + found.hbm, rel=0.2)


def test_products_do_not_hide_the_memory_of_others():
    """A row costs what its operations cost one by one, and weights are read once a call. Failed once with all of a dtype in
    one."""

    def of(rows):
        product = Work("bf16", 1e12 * rows, 1e6 + 1e3 * rows, 1.0)
        return Work("f32", 0.0, 0.0, 1.0), product, Work("bf16", 0.0, 1e9 * rows, 1.0)

    def partitioned(rows):
        return dataclasses.replace(paper, work=of(rows))

    paper = partition(planned(TARGET.one_device, 1), TARGET)
    timed = lambda works: rooflines(works, TARGET, Constants())
    products, memory, *_ = _Rate.of("", partitioned(2), partitioned(3), timed).at(8)
    (_, _), (compute, _), (_, waited) = timed(of(8))
    assert (products, memory) == pytest.approx((compute, waited)) and memory > 0


def test_sums_in_loops_move_memory():
    """What a loop adds up is read and written in each turn; a product writes its sum itself. Failed once with microbatches that
    cost nothing, though each reads and writes all gradients."""
    values = {n: Array("f32", (1000,), 4.0) for n in range(8)}
    body = Block(
        (1, 2),
        (
            Op("dot_general", (0, 0), (3,)),
            Op("add", (1, 3), (4,)),
            Op("multiply", (2, 0), (5,)),
        ),
        (4, 5),
    )
    loop = Op("while", (6, 7), (1, 2), (Block((1, 2), (), ()), body))
    found = work(Paper(Block((), (loop,), ()), values, {}), frozenset(["add", "multiply"]))
    product, state = found[1:]
    assert (product.bytes, state.bytes) == (3 * 4000, (1 + 2) * 4000) and state.looped


def test_indivisible_is_dropped_with_the_reason(sketcher):
    """Five stages of two layers, heads over 8. Failed once with the search ending there."""
    layouts = [(Candidate.parse(n), None) for n in ("data8", "tensor8", "stage8+x2")]
    found = search(layouts, TARGET, {None: sketcher}, make, compiles=0)
    why = {e.name: e.why for e in found.entries if e.tier == "dropped"}
    assert set(why) == {"tensor8", "stage8+x2"} and "not divisible by 8" in why["tensor8"]
    assert found.best.name == "data8" and found.best.tier == "partitioned"
    with pytest.raises(st.errors.ConfigError, match="no layout can run"):
        search(layouts[1:], TARGET, {None: sketcher}, make, compiles=0)


def test_what_is_too_big_loses(sketcher, monkeypatch):
    """State alone over the device's memory drops a layout; a peak on paper over it cannot win.

    The fault in mind: the fastest that does not fit as the best.
    """
    chip = st.Target("h100:1x8").chip
    entries = {n: room._sketched(Candidate.parse(n), None, sketcher, None) for n in ("data8", "fsdp8")}
    between = (entries["data8"].sketch.state + entries["fsdp8"].sketch.state) / 2
    tight = dataclasses.replace(chip, hbm_bytes=between / 0.92)
    monkeypatch.setitem(CHIPS, "h100", tight)
    found = search(
        [(e.candidate, None) for e in entries.values()], TARGET, {None: sketcher}, make, compiles=0
    )
    assert [e.tier for e in found.entries if e.name == "data8"] == ["dropped"]
    peak = next(e for e in found.entries if e.name == "fsdp8").peak
    assert found.best is None if peak > between else found.best.name == "fsdp8"


def test_where_nearly_nothing_fits_the_smallest_are_looked_at(sketcher, monkeypatch):
    """Not the fastest, which are the largest; nor is the best one that its own sketch says does not fit. Failed so: GPT-like
    models over all that a slice has got `data` without recomputation, at forty times the memory.
    """
    layouts = [
        (Candidate.parse(n), None) for n in ("data8", "data8+zero1", "data4-fsdp2", "data2-fsdp4", "fsdp8")
    ]
    sketches = {c.name: room._sketched(c, None, sketcher, None).sketch for c, _ in layouts}
    state, smallest = (min(getattr(s, what) for s in sketches.values()) for what in ("state", "peak"))
    assert state < 0.9 * smallest
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(TARGET.chip, hbm_bytes=0.95 * smallest / 0.92))
    assert state < TARGET.chip.usable_bytes < smallest
    found = search(layouts, TARGET, {None: sketcher}, make, partitions=1, compiles=0)
    assert found.best is None
    (looked,) = (e for e in found.entries if e.forecast)
    alive = [e.sketch.peak for e in found.entries if e.tier != "dropped"]
    assert len(alive) > 1 and looked.sketch.peak == min(alive)


def test_a_sketch_a_little_too_big_is_looked_at():
    """The fastest of those, beside the best that fit; far too big is not. Failed so: Llama 405B over two slices of v6e got a layout
    1.23 times as slow as the one that Google trains it in, whose sketch said 31.9 of 31.8 GiB, and paper 27.3."""

    def entry(name, seconds, peak):
        found = cost(TARGET, {"data": 8}, (), (), 0.0, Constants(), "test", known=(seconds, 0.0))
        return room.Entry(Candidate.parse(name), None, "sketched", Sketch(1.0, peak, found))

    fit = [entry(f"data8+x{n}", n, 90.0) for n in range(2, 12)]
    big = [entry("fsdp8", 1.0, 101.0), entry("fsdp8+x2", 0.5, 200.0), entry("fsdp8+x4", 2.0, 101.0)]
    looked = [e.name for e in room._few([*fit, *big], 8, "step_time", 100.0)]
    assert "fsdp8" in looked and "fsdp8+x2" not in looked and len(looked) == 8


def test_a_dead_compiler_is_one_line(sketcher, monkeypatch):
    """Killed, hung, out of memory: each loses its layout the place, and the next one wins.

    Failed once with the exception of the first worker ending the search.
    """
    names = ["data8", "fsdp8", "data2-fsdp4"]
    layouts = [(Candidate.parse(n), None) for n in names]
    papers = search(layouts, TARGET, {None: sketcher}, make, compiles=0)
    first, second, _ = (e.name for e in papers.entries)

    def compiled(lowered, made, level, timeout):
        name = Candidate.of(made.mesh, rules=made.rules).name
        if name == first:
            raise CompileError("the compiler's process ended with -9", where="target h100:1x8")
        if name == second:
            return CompileError("does not fit: temporaries take 99 GiB, the device has 1 GiB")
        return (
            CompileError("does not fit: temporaries take 2 GiB, the device has 1 GiB")
            if level == "full"
            else PROGRAM
        )

    monkeypatch.setattr(room, "lower_for", lambda plan, target: None)
    monkeypatch.setattr(room, "compile_lowered", compiled)
    found = search(layouts, TARGET, {None: sketcher}, make, compiles=3)
    by_name = {e.name: e for e in found.entries}
    assert "-9" in by_name[first].why and by_name[first].tier == "dropped"
    assert by_name[second].fits is False and "99 GiB" in by_name[second].why
    assert found.best is None  # the third compiled, and was refused where it was to be certified


class _Program:
    def __init__(self):
        self.memory = {f"{n}_size_in_bytes": 1000 for n in ("argument", "output", "alias", "temp")}
        self.source, self.fast = "compiled by nobody", False

    def as_text(self):
        return "HloModule m\n\nENTRY %e (p: f32[1]) -> f32[1] {\n  ROOT %p = f32[1]{0} parameter(0)\n}\n"


PROGRAM = _Program()


def test_what_a_compiler_runs_again_takes_time(monkeypatch):
    """A product that is run twice for lack of memory costs what it costs. Failed once with the work of the paper alone."""
    plan, _ = make(Candidate.parse("fsdp8"), None)
    paper = partition(plan, TARGET)
    made = forecast(plan, TARGET, paper=paper)
    size = 4096
    dot = "dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    array = f"f32[{size},{size}]{{1,0}}"
    text = (
        f"HloModule m\n\nENTRY %e (p: f32[{size},{size}]) -> f32[{size},{size}] {{\n  %p = {array} parameter(0)\n"
        f"  %d = {array} {dot}\n  %d.remat = {array} {dot}\n  ROOT %r = {array} add(%d, %d.remat)\n}}\n"
    )
    monkeypatch.setattr(_Program, "as_text", lambda self: text)
    constants = Constants.of(TARGET)
    found = of_program(made, PROGRAM, paper, constants, plan)
    assert found.recomputed == 2 * size**3
    more = found.recomputed / (TARGET.chip.flops["tf32"] * constants.compute)
    assert found.cost.compute - made.cost.compute == pytest.approx(more)
    assert "more FLOPs" in str(found) and "sends again" not in str(found)
    collective = "replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%sum"
    reduced = "f32[1000]{0} all-reduce(%p), channel_id="
    text = (
        "HloModule m\n\n%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
        "  ROOT %s = f32[] add(%a, %b)\n}\nENTRY %e (p: f32[1000]) -> f32[1000] {\n  %p = f32[1000]{0} parameter(0)\n"
        f"  %d = {reduced}1, {collective}\n  %d.remat = {reduced}2, {collective}\n"
        "  ROOT %r = f32[1000]{0} add(%d, %d.remat)\n}\n"
    )
    found = of_program(made, PROGRAM, paper, constants, plan)
    assert found.resent == 7000 and found.as_json()["bytes_resent"] == 7000
    assert "its compiler sends again 6.8 KiB of 13.7 KiB" in str(found)
    assert [c["asynchronous_bytes"] for c in found.as_json()["collectives"]] == [0.0]
    monkeypatch.setattr(_Program, "as_text", lambda self: text.replace("all-reduce(", "all-reduce-start("))
    found = of_program(made, PROGRAM, paper, constants, plan)
    assert [s.asynchronous for s in found.sent] == [14000.0] and "100%" in str(found)
    monkeypatch.setattr(PROGRAM, "fast", True)  # a level that schedules nothing
    found = of_program(made, PROGRAM, paper, constants, plan)
    assert [s.asynchronous for s in found.sent] == [None] and "asynchronous" not in str(found)


def test_space():
    """All divide, none twice, and slices carry data. The fault in mind: a mesh of another number of devices."""
    found = space(64, 1, {"data", "fsdp", "tensor", "context", "stage"}, 512, 8)
    assert len(found) > 200 and len(set(found)) == len(found)
    assert {c.devices for c in found} == {64} and max(c.mesh.get("tensor", 1) for c in found) == 8
    assert {c.mesh["slice"] for c in space(16, 2, {"data"}, 64, 16)} == {2}


def test_what_crosses_slices():
    """Data, fsdp or stages cross the slow network, each a mesh of the target. Failed once when data alone
    did.
    """
    target = st.Target("2*v5e:4x4")
    found = space(16, 2, {"data", "fsdp", "tensor", "stage"}, 64, 16)
    assert {c.devices for c in found} == {32}
    crossing = {tuple(a for a in ("slice", "slice_fsdp") if a in c.mesh) or ("stage",) for c in found}
    assert crossing == {("slice",), ("slice_fsdp",), ("stage",)}
    for candidate in found:
        target.mesh(**candidate.mesh)


FAILING = """#!/bin/bash
# In place of the compiler's process: killed, hung, out of memory.
request="${@: -1}/request.json"
grep -q '"data": 8' "$request" && kill -9 $$
grep -q '"fsdp": 8' "$request" && exec sleep 600
ulimit -v 100000
exec PYTHON "$@"
"""


def test_real_workers_that_fail(sketcher, monkeypatch, tmp_path):
    """A compiler's process that is killed, hangs, or has no memory is one line, and the search goes on.

    Failed once with the exception of a timeout passed on.
    """
    place = tmp_path / "python"
    place.write_text(FAILING.replace("PYTHON", sys.executable))
    place.chmod(0o700)
    monkeypatch.setattr(aot.sys, "executable", str(place))
    monkeypatch.setenv("SHARDTRAIN_CACHE", str(tmp_path))
    target = st.Target("cpu:8")
    two, three = (partition(planned(target.one_device, rows), target) for rows in (2, 3))
    here = Sketcher(planned(target.one_device, 1), {"": (two, three)}, batch(16), target, Constants())
    names = ["data8", "fsdp8", "data2-fsdp4", "data4-fsdp2", "data8+x2"]
    layouts = [(Candidate.parse(n), None) for n in names]

    def make(candidate, remat):
        return planned(target.mesh(**candidate.mesh), **candidate.options), 1e9

    monkeypatch.setattr(
        room, "_few", lambda entries, count, *_: [e for e in entries if e.name in names[:count]]
    )
    found = search(layouts, target, {None: here}, make, partitions=5, compiles=3, timeout=4)
    by_name = {e.name: e for e in found.entries}
    assert "ended with -9" in by_name["data8"].why and "no program after 4 s" in by_name["fsdp8"].why
    assert "ended with" in by_name["data2-fsdp4"].why
    assert all(by_name[n].tier == "dropped" and "\n" not in by_name[n].why for n in names[:3])
    assert found.best.name in names[3:] and found.best.tier == "partitioned"


@over_tensor
def test_words_and_front(sketcher):
    """The front is in order and nothing on it is both slower and larger. The fault in mind: ties by name."""
    layouts = [(Candidate.parse(n), None) for n in NAMES]
    found = search(layouts, TARGET, {None: sketcher}, make, compiles=0)
    front = found.pareto()
    assert [e.peak for e in front] == sorted((e.peak for e in front), reverse=True)
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(front))
    assert found.words().startswith(("data parallelism", "hybrid parallelism", "model parallelism"))
    assert found.as_json()["counts"]["partitioned"] == len(NAMES)
    assert found.best.name in found.text()
