"""Models of others that scan their own layers, with the one line: gathered layer by layer, twice, and never kept."""

import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import shardtrain as st

WIDTH, HIDDEN, LAYERS = 128, 512, 6


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x)))), None


class LinenNet(nn.Module):
    line: bool = True
    path: str = "blocks"

    @nn.compact
    def __call__(self, x):
        layer = LinenBlock
        if self.line:  # as the README has it
            layer = nn.map_variables(
                LinenBlock,
                "params",
                trans_in_fn=lambda p: {"params": st.gather(p["params"], self.path)} if p else p,
                init=self.is_initializing(),
            )
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return nn.Dense(8)(stack(name="blocks")(x, None)[0])


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxNet(nnx.Module):
    def __init__(self, rngs, line=True, path="blocks"):
        self.line, self.path = line, path

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return NnxBlock(rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(WIDTH, 8, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            if self.line:
                layer = st.gather(layer, self.path)
            return layer(x)

        return self.head(run(self.blocks, x))


def planned(kind, **options):
    model = (
        st.linen(LinenNet(**options), inputs=lambda batch: (batch["x"],))
        if kind == "linen"
        else lambda rngs: NnxNet(rngs, **options)
    )
    return st.plan(
        model,
        lambda model, batch: jnp.square(model(batch["x"]) - batch["y"]).mean(),
        optax.sgd(0.1),
        batch=st.batch_spec(x=(64, WIDTH), y=(64, 8)),
        mesh=st.make_mesh(fsdp=8),
        rules="fsdp",
    )


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_one_line_gathers_layer_by_layer(kind):
    """Three passes over the layers, and less memory than without the line.

    Failed once: a scan without a remat of its own kept all gathered weights (two thirds of the bytes).
    """
    without, line = planned(kind, line=False).compile(), planned(kind).compile()
    found = st.audit(line)
    assert found.ratio == pytest.approx(1.0, abs=2e-3) and not found.findings
    runs = {c.loops for c in line.collectives() if c.op == "all-gather" and c.bytes > 2**16}
    assert runs == {(LAYERS,)}
    assert [f.kind for f in st.audit(without).findings] == ["stack-gathered-whole"]
    assert line.memory()["temporaries"] < 0.7 * without.memory()["temporaries"]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_path_that_is_none(kind):
    """The fault in mind: weights used as shards, since no leaf had the path."""
    with pytest.raises(st.ShardingError, match=r"blocs.*no parameter under this path[\s\S]*blocks"):
        planned(kind, path="blocs")
