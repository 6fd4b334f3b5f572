"""Forecasts and searches of a tiny model for the tests of their pictures, made once."""

from __future__ import annotations

import functools
from typing import Any

import optax

import shardtrain as st
from shardtrain.models import GPTConfig, build_model, language_model_loss
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.cost import Constants
from shardtrain.plan.forecast import Forecast, forecast
from shardtrain.plan.partitioned import partition
from shardtrain.plan.plan import Plan
from shardtrain.plan.ranking import Search
from shardtrain.plan.search import search
from shardtrain.plan.sketch import Sketcher

TARGET = st.Target("h100:1x8")
LAYOUTS = ["data8", "data8+zero1", "fsdp8", "fsdp2-tensor4", "data4-stage2+x2", "tensor8", "data2-fsdp4+x2"]
_MODEL = GPTConfig(vocab=256, sequence=32, embed=64, layers=2, heads=4)


def batch(rows: int) -> Any:
    return st.batch_spec(tokens=((rows, 32), "int32"), targets=((rows, 32), "int32"), weights=(rows, 32))


def planned(mesh: Any, rows: int = 16, **options: Any) -> Plan:
    return st.plan(
        lambda rngs: build_model(_MODEL, rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=batch(rows),
        mesh=mesh,
        **options,
    )


@functools.cache
def made(name: str = "data2-fsdp2-tensor2") -> tuple[Plan, Forecast]:
    """A plan on eight stand-ins for H100, and its forecast on paper."""
    candidate = Candidate.parse(name)
    plan = planned(TARGET.mesh(**candidate.mesh), **candidate.options)
    return plan, forecast(plan, TARGET, model_flops=1e9)


@functools.cache
def found() -> Search:
    """Seven layouts, four of them partitioned; tensor8 does not divide four heads."""
    two, three = (partition(planned(TARGET.one_device, rows), TARGET) for rows in (2, 3))
    sketcher = Sketcher(planned(TARGET.one_device, 1), {"": (two, three)}, batch(16), TARGET, Constants())

    def make(candidate: Candidate, remat: str | None) -> tuple[Plan, float]:
        return planned(TARGET.mesh(**candidate.mesh), **candidate.options), 1e9

    layouts = [(Candidate.parse(name), None) for name in LAYOUTS]
    return search(layouts, TARGET, {None: sketcher}, make, compiles=0, partitions=4)
