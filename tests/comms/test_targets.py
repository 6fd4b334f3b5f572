"""The bytes of presets in what the TPU and GPU compilers make of them. Needs the extras aot-tpu and aot-gpu."""

import importlib.util
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def bytes_benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bytes_benchmark", BENCHMARKS / "bytes.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:1x8"])
@pytest.mark.parametrize("layout", ["data", "zero1", "fsdp", "tensor", "tensor_sequence", "fsdp x tensor"])
def test_presets_send_the_least(target, layout):
    """Compiled anew where the code changed. The fault in mind: one that only these compilers show."""
    bench = bytes_benchmark()
    row = bench.measure(bench.Case(target, "gpt", layout))
    assert 0.98 <= row["ratio"] <= (1.05 if " x " in layout else 1.02), row
    assert not [f for f in row["findings"] if not f.startswith("note")]
