"""Rules are values; what they make of a leaf; what constrain makes of an activation."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain.sharding import context
from shardtrain.sharding.rules import resolve

RULES = st.rules.fsdp_tensor


@pytest.fixture(scope="module")
def mesh():
    return st.make_mesh(data=2, fsdp=2, tensor=2)


def test_rules_are_values():
    """The fault in mind: override changed the preset."""
    other = RULES.override(mlp=None)
    assert RULES.params["mlp"] == ("tensor",) and other.params["mlp"] == () and other.activations["mlp"] == ()
    assert other != RULES and other.override(mlp="tensor") == RULES
    assert hash(other.override(mlp="tensor")) == hash(RULES)
    assert RULES.override(params={"mlp": None}).activations["mlp"] == ("tensor",)
    moments_apart = st.rules.data.override(optimizer={"*": "data"})
    assert moments_apart.override(vocab=None).optimizer["*"] == ("data",)
    assert st.rules.zero1.override(vocab=None).hold and not st.rules.zero1.override(hold=False).hold


@pytest.mark.parametrize(
    ("shape", "logical", "spec"),
    [
        ((128, 512), ("embed", "mlp"), P("fsdp", "tensor")),
        ((4, 128, 3, 8, 16), ("layers", "embed", None, "heads", "head_dim"), P(None, "fsdp", None, "tensor")),
        ((512, 128), ("vocab", "embed"), P("tensor", "fsdp")),
        ((128,), ("embed",), P()),  # small: whole
        ((4, 2048), ("layers", "embed"), P(None, "fsdp")),  # never over layers
        (
            (8, 128, 64),
            ("expert", "embed", None),
            P(None, "fsdp"),
        ),  # nor over experts, which are not gathered
        ((101, 4096), (None, None), P(None, "fsdp")),  # the dim that divides
        ((128, 512), None, P("fsdp")),
        ((101, 103), None, P()),
        ((), (), P()),
        ((0, 5000), None, P()),
    ],
)
def test_where_a_leaf_goes(mesh, shape, logical, spec):
    """Failed once when "*" took the layers dim, and again when it took that of the experts."""
    assert resolve("leaf", shape, logical, RULES.params, mesh) == spec


def test_infer_takes_the_largest(mesh):
    """The fault in mind: leading."""
    rules = st.rules.infer
    assert resolve("leaf", (64, 512), ("any", "name"), rules.params, mesh, pick=rules.pick) == P(None, "fsdp")


@pytest.mark.parametrize(
    ("shape", "logical", "words"),
    [
        ((128, 511), ("embed", "mlp"), ["dim 1 'mlp' = 511", "divisible by 2 (mesh tensor=2)", "mlp=512"]),
        ((128, 512), ("embed", "mpl"), ["'mpl'", "'mlp'"]),
        ((128, 512), ("heads", "mlp"), ["both claim", "'tensor'", "dims 0 'heads' and 1 'mlp'"]),
        ((128, 512), ("embed",), ["1 logical axes", "2 dims"]),
    ],
)
def test_errors_say_where_and_the_way_out(mesh, shape, logical, words):
    """Left to the partitioner each is silent: the partitioner replicates an indivisible dim without a word."""
    with pytest.raises(st.ShardingError) as caught:
        resolve("blocks/mlp/down/kernel", shape, logical, RULES.params, mesh)
    text = str(caught.value)
    assert (
        text.startswith("blocks/mlp/down/kernel: ") and "data=2 fsdp=2 tensor=2" in text and "try: " in text
    )
    assert all(word in text for word in words), text


def test_annotations():
    """First match wins; the leading slash. The fault in mind: `search` in place of `fullmatch`."""
    found = st.annotate({r".*/up/kernel": ("embed", "mlp"), r".*kernel": ("mlp", "embed")}).apply(
        {"up/kernel": (2, 3), "a/down/kernel": (3, 2), "bias": (3,)}, {"bias": None}
    )
    assert found == {"bias": None, "up/kernel": ("embed", "mlp"), "a/down/kernel": ("mlp", "embed")}
    with pytest.raises(st.ShardingError, match="matches no parameter"):
        st.annotate({r".*": ("mlp",), "bias": ("mlp",)}).apply({"bias": (3,)}, {})
    with pytest.raises(st.ShardingError, match="matches no parameter"):
        st.annotate({r"kernel": ("embed", "mlp")}).apply(
            {"up/kernel": (2, 3)}, {}
        )  # the whole path, not a part
    with pytest.raises(st.ShardingError, match="regular expression"):
        st.annotate({r"(": ("mlp",)})


def test_constrain_is_free_outside():
    """No equation at all. The fault in mind: it called with_sharding_constraint on an empty mesh."""
    assert not jax.make_jaxpr(lambda x: st.constrain(x, "batch", "nonsense"))(jnp.ones((2, 3))).eqns


def constrained(mesh, shape, *axes, manual=frozenset()):
    layout = context.Layout(mesh, RULES.activations, manual)

    def function(x):
        with context.use(layout):
            return st.constrain(x, *axes)

    return jax.jit(function)(jnp.ones(shape)).sharding.spec


def test_constrain_inside(mesh):
    """Trailing dims; batch is the first. The fault in mind: two names for three dims were put on the first two."""
    assert constrained(mesh, (8, 16, 32), "batch", "seq", "mlp") == P(("data", "fsdp"), None, "tensor")
    assert constrained(mesh, (8, 16, 32), "batch", "mlp") == P(("data", "fsdp"), None, "tensor")
    assert constrained(mesh, (8, 16, 32), "mlp") == P(None, None, "tensor")


@pytest.mark.parametrize(
    ("shape", "axes", "words"),
    [
        ((8, 31), ("batch", "mlp"), ["31", "2 (mesh tensor=2)"]),
        ((6, 32), ("batch", "mlp"), ["dim 0 'batch' = 6", "4 (mesh data=2 fsdp=2)"]),
        ((8, 32), ("batch", "mpl"), ["'mpl'", "'mlp'"]),
        ((8, 32), ("heads", "mlp"), ["both claim"]),
        ((8,), ("batch", "mlp"), ["2 logical axes", "1 dims"]),
    ],
)
def test_constrain_is_strict_inside(mesh, shape, axes, words):
    """The fault in mind: an uneven dim was replicated without a word."""
    with pytest.raises(st.ShardingError) as caught:
        constrained(mesh, shape, *axes)
    assert all(word in str(caught.value) for word in words), str(caught.value)
