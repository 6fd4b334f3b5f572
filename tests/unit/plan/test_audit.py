"""`st.audit`: bytes by axis against the minimum, who sends too much, functions of one's own, and lines that stay right."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import shardtrain as st

WIDTH = 256
AXES = {"qkv": ("embed", "heads"), "out": ("heads", "embed")}


def fused(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    return (jnp.tanh(q * k) * v) @ p["out"]


def make(apply=fused):
    init = lambda key: {"qkv": jax.random.normal(key, (WIDTH, 3 * WIDTH)), "out": jnp.ones((WIDTH, WIDTH))}
    return st.plan(
        (init, apply),
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.adam(1e-3),
        batch=st.batch_spec(x=(64, 32, WIDTH)),
        mesh=st.make_mesh(data=2, tensor=4),
        rules="tensor",
        annotations=st.annotate(AXES),
    )


@pytest.fixture(scope="module")
def plan():
    return make()


@pytest.fixture(scope="module")
def audit(plan):
    return st.audit(plan.compile())


def test_by_axis(audit):
    """Sent and least, in mesh order; what is over is exactly the difference. The fault in mind: axes in alphabetical order."""
    by_axis = audit.by_axis()
    assert list(by_axis) == ["data", "tensor"]
    assert sum(sent for sent, _ in by_axis.values()) == pytest.approx(audit.bytes)
    assert sum(least for _, least in by_axis.values()) == pytest.approx(audit.minimum.bytes)
    assert list(audit.over()) == ["tensor"]  # data is at its minimum
    assert audit.over()["tensor"] == pytest.approx(by_axis["tensor"][0] - by_axis["tensor"][1])
    assert sum(sender.bytes for sender in audit.senders("tensor")) == pytest.approx(by_axis["tensor"][0])


def test_the_text_says_which_axis_and_why(audit):
    """The fault in mind: a table from which nobody can tell what to change."""
    text = str(audit)
    assert "tensor sends" in text and "more than it must" in text and "data sends" not in text
    why = text.split("more than it must; what it sends:")[1].splitlines()[1:5]
    assert any("needless-permute" in line and f"{__file__}:" in line for line in why)
    assert text.splitlines()[-1] == audit.summary()
    rows = [line.split() for line in text.splitlines()]
    (permutes,) = [row for row in rows if row[:2] == ["tensor", "all-to-all"]]
    assert permutes[5:7] == ["0", "B"] and permutes[7].startswith("+")


def test_the_picture_says_it_too(audit):
    """One bar each for sent and least; only the axis that is over is orange. The fault in mind: bars of one colour."""
    root = ElementTree.fromstring(audit.svg())
    colors = [element.get("fill") for element in root.iter() if element.tag.endswith("rect")]
    assert colors.count("#c2410c") == 1 and colors.count("#2563eb") == 1 and colors.count("#94a3b8") == 2
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert any("x the least is sent" in text for text in texts)
    assert any(f"{__file__}:" in text for text in texts)


def test_json_is_json(audit):
    """No NaN, no dataclass. The fault in mind: an infinity for an axis that must send nothing."""
    assert json.loads(json.dumps(audit.as_json(), allow_nan=False))["ratio"] == pytest.approx(audit.ratio)


def test_a_function_of_ones_own_has_no_minimum(plan):
    """Bytes and findings, but no ratio and nothing that is over. The fault in mind: the training step's minimum."""
    found = st.audit(plan.jit(lambda state, batch: plan.model(state)(batch["x"]).sum()))
    assert found.minimum is None and found.ratio is None and found.over() == {} and found.bytes > 0
    assert found.as_json()["minimum"] is None and "least" not in found.svg()
    assert "least" in str(found) and "?" in str(found)  # the column, with nothing known
    json.dumps(found.as_json(), allow_nan=False)


def test_nothing_to_send():
    """One device. The fault in mind: a division by zero."""
    plan = st.plan(
        (lambda key: {"w": jnp.ones((8, 8))}, lambda p, x: x @ p["w"]),
        lambda model, batch: model(batch["x"]).mean(),
        optax.sgd(0.1),
        batch=st.batch_spec(x=(4, 8)),
        mesh=st.make_mesh(devices=jax.devices()[:1], data=1),
        rules="data",
    )
    found = st.audit(plan.compile())
    assert found.bytes == 0 and found.ratio is None and found.async_share is None
    assert "nothing is sent" in str(found) and ElementTree.fromstring(found.svg()) is not None


@pytest.fixture
def fresh_cache(tmp_path):
    """JAX's own compilation cache in a folder of this test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path / "xla"))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_who_compiles_is_no_part_of_the_key(fresh_cache):
    """A step asked for from two lines is one program in JAX's cache, and so are the little ones around it.

    Failed once with every frame in the key: a process that is started in another way compiled everything anew.
    """

    def kept(plan):
        plan.compile()
        plan.init(0)
        return {file.name for file in (fresh_cache / "xla").iterdir() if file.name.endswith("-cache")}

    first = kept(make())
    again = kept(make())
    assert len(first) > 1 and again == first


def test_lines_are_those_of_today(fresh_cache):
    """The same model three lines further down, and a program from JAX's cache. Failed once: the program came back with
    the lines that the code had when it was compiled."""
    code = 'import jax.numpy as jnp\ndef apply(p, x):\n    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)\n'
    code += '    return (jnp.tanh(q * k) * v) @ p["out"]\n'

    def line_found(text):
        file = fresh_cache / "model.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("model", file)
        module = importlib.util.module_from_spec(spec)
        exec(compile(text, str(file), "exec"), module.__dict__)
        findings = st.audit(make(module.apply).compile()).findings
        return {f.source for f in findings if f.kind == "needless-permute"} - {""}

    assert f"{fresh_cache}/model.py:3" in line_found(code)
    assert any((fresh_cache / "xla").iterdir())
    found = line_found("\n\n\n" + code)
    assert f"{fresh_cache}/model.py:6" in found and f"{fresh_cache}/model.py:3" not in found
