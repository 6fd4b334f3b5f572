"""What `benchmarks/pipeline_memory.py` measured is what the README draws."""

import json
import pathlib

RESULTS = pathlib.Path(__file__).parents[3] / "benchmarks" / "results"


def test_1f1b_does_not_grow():
    """The kept figures: from 2p microbatches on 1F1B's memory is the same to the byte, and GPipe's is not."""
    found = json.loads((RESULTS / "pipeline_memory.json").read_text())
    by = {(r["schedule"], r["microbatches"]): r["temporaries"] for r in found["rows"]}
    stages = found["shapes"]["stages"]
    assert len({n for (s, m), n in by.items() if s == "1f1b" and m >= 2 * stages}) == 1
    gpipe = [by["gpipe", m] for m in (8, 16, 32, 64)]
    assert gpipe == sorted(gpipe) and found["growth"]["gpipe"] >= 1
