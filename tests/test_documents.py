"""What README and notebooks show is what happens."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README, re.S)]


def faults() -> list[list[str]]:
    """Rows of the tables of faults: what, what happens, how soon, what it says, and the test."""
    found, inside = [], False
    for line in README.splitlines():
        inside = line.startswith("| fault |") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| fault |", "|---")):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_fault_is_held_by_a_test():
    """At least thirty, each told apart, and each by a test that there is. Failed once on a test that had another name."""
    rows = faults()
    tests: dict[str, set[str]] = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        tests.setdefault(file.name, set()).update(re.findall(r"^def (test_\w+)", file.read_text(), re.M))
    assert len(rows) >= 30 and all(len(row) == 5 and row[0] and row[1] for row in rows)
    assert len({(row[0], row[2], row[3]) for row in rows}) == len(rows)
    for row in rows:
        file, _, name = row[4].strip("`").partition("::")
        assert name in tests.get(file, ()), f"{row[0]}: no test {row[4]}"


def run(code: str, tmp_path: pathlib.Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_first_example_and_any_model(tmp_path):
    """The ten lines, then the linen example over the same mesh. The fault in mind: a renamed argument."""
    first = next(b for b in BLOCKS if "class Mlp" in b)
    other = next(b for b in BLOCKS if "class Net" in b)
    out = run(first + other + "\nprint(plan)\nprint(Mlp(64, 256, nnx.Rngs(0))(x[:2]).shape)", tmp_path)
    assert "up/kernel" in out and "all-gather" in out and "params" not in out.split("collective")[0]
    assert "Dense_0/kernel" in out and out.endswith("(2, 64)\n")


@pytest.mark.parametrize("sizes", ["data=8", "tensor=8", "data=4, tensor=2"])
def test_the_smallest_example(sizes, tmp_path):
    """And the one-word changes under it. The fault in mind: tensor=8 without annotations."""
    code = next(b for b in BLOCKS if "(64, 64)" in b and "ArrayLoader" in b)
    assert f"st.make_mesh({sizes})" in README
    out = run(
        code.replace("data=8", sizes) + "\nprint(run.history[0]['loss'] > run.history[-1]['loss'])", tmp_path
    )
    assert out.endswith("True\n")


def test_the_pipeline(tmp_path):
    """Layer 1 on device A, layer 2 on device B: it learns, and the picture has both. The fault in mind: a renamed part."""
    code = next(b for b in BLOCKS if "st.Stages(" in b)
    out = run(code + "\nprint(run.history[0]['loss'] > run.history[-1]['loss'])", tmp_path)
    assert "stage 0" in out and "stage 1" in out and out.endswith("True\n")


@pytest.mark.slow
def test_a_long_sequence(tmp_path):
    """Its losses are those of one device. The fault in mind: a loss that is not of the tokens that it sees."""
    code = next(b for b in BLOCKS if "st.positions(" in b).replace("steps=50", "groups=2, steps=5")
    alone = code.replace("data=2, context=4", "devices=jax.devices()[:1], data=1")
    assert alone != code
    losses = [
        run(c + "\nprint(*[row['loss'] for row in run.history])", tmp_path).splitlines()[-1].split()
        for c in (code, alone)
    ]
    divided, whole = ([float(x) for x in values] for values in losses)
    assert len(whole) == 5 and divided == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_the_verification(tmp_path):
    """Over the model of the ten lines. The fault in mind: a renamed argument."""
    first = next(b for b in BLOCKS if "class Mlp" in b)
    verify = next(b for b in BLOCKS if "st.verify(" in b)
    assert "2 of 2 layouts are equal" in run(first + verify + "\nassert result.equal", tmp_path)


def test_the_error_shown(tmp_path):
    """The README's error message is the one that users get, to the letter."""
    shown = re.search(r"```\n(ShardingError: .*?)\n```", README, re.S).group(1)
    code = """
import shardtrain as st
from shardtrain.sharding.rules import resolve
st.simulate_devices(8)
try: resolve("blocks/mlp/down/kernel", (2050, 64), ("mlp", "embed"), st.rules.tensor.params, st.make_mesh(tensor=8))
except st.ShardingError as error: print("ShardingError: " + str(error))
"""
    assert run(code, tmp_path).strip() == shown


def test_commands_in_the_readme_parse():
    """Every `shardtrain ...` line with a config resolves. The fault in mind: a flag that had been renamed."""
    from shardtrain.config import resolve

    lines = re.findall(r"^shardtrain train (configs/\S+)((?: --\S+ \S+)*)$", README, re.M)
    assert len(lines) >= 5
    for config, flags in lines:
        resolved, _ = resolve(str(ROOT / config), flags.split())
        assert resolved.global_batch % (resolved.groups or 1) == 0


def test_launches_in_the_readme_render(capfd, monkeypatch):
    """Every `shardtrain launch ...` line, as --dry-run. Failed once with a topology of other chips than its hosts have."""
    from shardtrain.cli import main

    monkeypatch.chdir(ROOT)
    lines = re.findall(r"shardtrain launch ([a-z].* -- (?:train|python) \S+)", README.replace("\\\n", " "))
    assert {line.split()[0] for line in lines} == {"local", "slurm", "jobset", "tpu-vm", "aws", "sky"}
    for line in lines:
        words = line.split()
        cut = words.index("--")
        assert main(["launch", *words[:cut], "--dry-run", *words[cut:]]) == 0, capfd.readouterr().err


NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem.startswith("02") else [])
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    """Executed from top to bottom in a fresh kernel, with results that are kept in the place of compilers for hardware
    that is not here. The fault in mind: a cell that used a later name."""
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in content.cells), "notebooks are kept without outputs"
    monkeypatch.setenv("STORED_RESULTS", "1")
    saved = {k: os.environ.pop(k) for k in ("XLA_FLAGS", "JAX_PLATFORMS") if k in os.environ}
    try:
        NotebookClient(content, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finally:
        os.environ.update(saved)
    outputs = [o for cell in content.cells for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2, (
        "a picture of the sharding and a loss curve"
    )
    nbformat.write(content, tmp_path / notebook.name)
