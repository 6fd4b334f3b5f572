"""The HLO reader against bytes counted by hand, on small programs that use each collective once."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain.plan import hlo
from shardtrain.plan.hlo import HloError, collectives, mesh_axes, replica_groups

N, X = 4, 64 * 128 * 4  # devices along the axis; bytes of the whole array
F = (N - 1) / N


@pytest.fixture(scope="module")
def mesh():
    return st.make_mesh(data=2, tensor=4)


DIVIDED = P("tensor")


def compiled(mesh, function, out=DIVIDED, into=DIVIDED):
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=into, out_specs=out, axis_names=set(mesh.axis_names), check_vma=False
    )
    return collectives(jax.jit(mapped).lower(jnp.ones((64, 128))).compile().as_text(), mesh)


def looped(function, times):
    return lambda x: jax.lax.scan(lambda c, _: (function(c), None), x, None, length=times)[0]


def shift(x):
    return jax.lax.ppermute(x, "tensor", [(i, (i + 1) % N) for i in range(N)])


CASES = {
    # local operand x: [16, 128], a quarter of the array
    "all-reduce": (lambda x: jax.lax.psum(x, "tensor"), P("tensor"), X / 4, 2 * F * X / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "tensor", tiled=True), P(), X, F * X),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
        P("tensor"),
        X / 4,
        F * X / 4,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True),
        P("tensor"),
        X / 4,
        F * X / 4,
    ),
    "collective-permute": (shift, P("tensor"), X / 4, X / 4),
}


@pytest.mark.parametrize("op", CASES)
def test_each_collective(mesh, op):
    """Failed once: the payload of a reduce-scatter was its result."""
    function, out, payload, wire = CASES[op]
    found = compiled(mesh, function, out)
    assert [(c.op, c.axes, c.count, c.dtype) for c in found] == [(op, ("tensor",), 1, "f32")]
    assert found[0].bytes == payload and found[0].wire_bytes == pytest.approx(wire)
    assert found.wire_bytes == pytest.approx(wire)


@pytest.mark.parametrize("op", ["all-reduce", "collective-permute", "all-to-all"])
@pytest.mark.parametrize("times", [(3,), (2, 5)])
def test_loops_multiply(mesh, op, times):
    """Failed once: a body counted once."""
    function, _, _, wire = CASES[op]
    total = 1
    for count in times:
        function, total = looped(lambda x, f=function: jnp.sin(f(x)), count), total * count
    found = compiled(mesh, function)
    assert sum(c.count for c in found) == total
    assert found.wire_bytes == pytest.approx(wire * total)


def test_axes(mesh):
    """The fault in mind: ids taken for coordinates."""
    assert compiled(mesh, lambda x: jax.lax.psum(x, "data"))[0].axis == "data"
    assert compiled(mesh, lambda x: jax.lax.psum(x, ("data", "tensor")))[0].axis == "data+tensor"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['data'=2,'tensor'=4] {'data'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh[data=2,tensor=4] {tensor}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),  # newer XLA: no quotes
        ("replica_groups=mesh['data'=2,'tensor'=4] {'tensor':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['data'=2,'tensor'=4] {'tensor':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (
            "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}",
            [[0, 1, 4, 5], [2, 3, 6, 7]],
        ),
        (
            "replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, dimensions={0}",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
        (
            "replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]<=[4,2]T(1,0)) {'x'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        (
            "replica_groups=mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("channel_id=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_spellings_of_groups(mesh, text, groups):
    """Failed once when a transpose of ids was left out, once when device ids were ignored."""
    assert replica_groups(text, mesh.shape) == groups
    assert mesh_axes([[0, 1, 2, 3]], mesh.shape) == ("tensor",)
    assert mesh_axes([[0, 4]], mesh.shape) == ("data",)


@pytest.mark.parametrize(
    "text",
    [
        "replica_groups=torus['data'=2] {'data'}",
        "replica_groups=mesh['x'=2,'y'=4], device_ids=(0,2,4) {'x'}",
    ],
)
def test_unknown_spellings_are_loud(mesh, text):
    """The fault in mind: all devices, where the groups are not understood."""
    with pytest.raises(HloError, match="not understood"):
        replica_groups(text, mesh.shape)


def test_guards(mesh):
    """An unknown trip count, and a collective that nothing reaches, that was not parsed, or of an unknown kind, are loud.
    Each failed once when its guard was taken out."""
    body = looped(lambda x: jnp.sin(jax.lax.psum(x, "tensor")), 3)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=DIVIDED, out_specs=DIVIDED, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((64, 128))).compile().as_text()
    assert "known_trip_count" in text
    plain = text.replace("known_trip_count", "unknown")
    assert collectives(plain, mesh).by_axis() == collectives(text, mesh).by_axis()  # read off the condition
    with pytest.raises(HloError, match="unknown number of times"):
        collectives(plain.replace("direction=LT", "direction=EQ"), mesh)
    with pytest.raises(HloError, match="not reached"):
        collectives(text.replace("body=", "bodi="), mesh)
    body = re.search(r"body=%([\w.\-]+)", text).group(1)
    with pytest.raises(HloError, match="1 collectives in the text, 0 parsed"):
        collectives(re.sub(rf"(?m)^(%{re.escape(body)} .*) -> ", r"\1 => ", text), mesh)
    with pytest.raises(HloError, match=r"all-reduce-by-magic in .* looks like a collective"):
        collectives(text.replace(" all-reduce(", " all-reduce-by-magic("), mesh)
    with pytest.raises(HloError, match="unknown number of times"):
        # a loop that ends on a value of the data
        until = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: jax.lax.psum(c, "tensor"), x)
        compiled(mesh, until)


def test_asynchronous_collectives_that_share_a_channel():
    """The gradients of an unrolled decoder on v5e: eleven all-reduces in pieces, all of channel 1, several of one shape.

    Failed once: pieces of one channel were taken for one collective (0.41 of the bytes).
    """
    import gzip
    import pathlib

    folder = pathlib.Path(__file__).parent / "hlo_programs" / "others"
    text = gzip.decompress((folder / "tpu_async_all_reduces.txt.gz").read_bytes()).decode()
    found = collectives(text, {"data": 8})
    embed, vocab, mlp, layers, positions = 4096, 32768, 16384, 2, 1024
    matrices = layers * (4 * embed**2 + 2 * embed * mlp) + (vocab + positions) * embed
    assert sum(c.asynchronous for c in found) == 11
    assert abs(found.wire_bytes / (2 * 7 / 8 * 4 * matrices) - 1) < 1e-3


def branching(name):
    """Eight turns of a loop; a branch in it holds a sum over both devices and a product."""
    return f"""
HloModule m, is_scheduled=true
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}
%yes (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4]{{1,0}} parameter(0)
  %d = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, metadata={{op_name="{name}/dot"}}
  ROOT %r = f32[4,4]{{1,0}} all-reduce(%d), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add, metadata={{op_name="{name}/psum"}}
}}
%no (x: f32[4,4]) -> f32[4,4] {{
  ROOT %x = f32[4,4]{{1,0}} parameter(0)
}}
%body (s: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %s = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[4,4]{{1,0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %n = s32[] add(%i, %one)
  %c = f32[4,4]{{1,0}} conditional(%i, %v, %v), branch_computations={{%no, %yes}}
  ROOT %t = (s32[], f32[4,4]{{1,0}}) tuple(%n, %c)
}}
%cond (s: (s32[], f32[4,4])) -> pred[] {{
  %s = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %k = s32[] constant(8)
  ROOT %l = pred[] compare(%i, %k), direction=LT
}}
ENTRY %main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4]{{1,0}} parameter(0)
  %z = s32[] constant(0)
  %t = (s32[], f32[4,4]{{1,0}}) tuple(%z, %x)
  %w = (s32[], f32[4,4]{{1,0}}) while(%t), condition=%cond, body=%body
  ROOT %o = f32[4,4]{{1,0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("jit(f)/while/body/cond/branch_1_fun/runs_3_of_16", 1.5),
        ("jit(f)/while/body/cond/branch_0_fun/runs_1_of_2/cond/branch_1_fun/runs_6_of_8", 6),
        ("jit(f)/while/body/cond/branch_1_fun", 8),
        ("jit(f)/runs_1_of_2/cond/branch_1_fun/other", 8),
    ],
)
def test_branches_are_counted_as_they_are_named(name, runs):
    """A trace that knows how often a branch runs says so; one that does not is counted in full. The second is named by its
    own branch, not by the one around it."""
    program = hlo.read(branching(name), {"data": 2})
    (one,) = program.collectives
    assert one.count == runs and one.wire_bytes == runs * 64
    assert program.flops == runs * 2 * 4**3


RECOMPUTED = """HloModule m
%product (x: f32[4,4], y: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  %y = f32[4,4]{1,0} parameter(1)
  ROOT %d = f32[4,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%product.1 (x: f32[4,4], y: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  %y = f32[4,4]{1,0} parameter(1)
  ROOT %d.1 = f32[4,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  %p = f32[4,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%product
  %p.remat = f32[4,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%product.1
  %p.remat2 = f32[4,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%product.1
  %q.remat3 = f32[4,4]{1,0} fusion(%p, %p.remat), kind=kCustom, calls=%product
  ROOT %r = f32[4,4]{1,0} add(%q.remat3, %p.remat2)
}
"""


RESENT = """HloModule r

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %r.6 = f32[2]{0} reduce-scatter(%x), channel_id=1, GROUPS
  %r.6.remat = f32[2]{0} reduce-scatter(%x), channel_id=2, GROUPS
  %r.7.remat = f32[2]{0} reduce-scatter(%x), channel_id=3, GROUPS
  %t = f32[2]{0} add(%r.6.remat, %r.7.remat)
  ROOT %u = f32[2]{0} add(%r.6, %t)
}
""".replace("GROUPS", "replica_groups={{0,1,2,3}}, use_global_device_ids=true, dimensions={0}, to_apply=%sum")


def test_collectives_that_the_compiler_runs_again():
    """One of three is a copy of another; the third is alone, whatever it is called. The fault in mind: every `.remat`."""
    program = hlo.read(RESENT, {"data": 4})
    assert program.collectives.wire_bytes == 3 * 24 and program.resent == 24


def test_products_that_the_compiler_runs_again():
    """Two copies of `p` are its own doing; `q`, of which only a copy is left, runs once and is none.

    Failed once with every `.remat` counted.
    """
    program = hlo.read(RECOMPUTED, {"data": 1})
    assert (program.flops, program.recomputed) == (4 * 2 * 4**3, 2 * 2 * 4**3)
