"""What is wrong with a compiled step: each check looks for one fault and names the line and the way out.

A check is a generator function of the step; a new one is written in the module that its evidence comes from (the plan's
layout, the compiler, loops, what is sent) and entered in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shardtrain.plan.findings.compiler import (
    does_not_fit,
    donation_failed,
    host_transfer,
    involuntary_replication,
)
from shardtrain.plan.findings.finding import LARGE, SEVERITIES, Finding, Severity
from shardtrain.plan.findings.layout import optimizer_less_divided, replicated_parameter, stack_gathered_whole
from shardtrain.plan.findings.loops import reduced_in_loop, repeated_in_loop
from shardtrain.plan.findings.sent import (
    gathered_activation,
    gathered_weight,
    needless_permute,
    scatter_would_do,
    wide_collective,
)

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled

__all__ = ["CHECKS", "LARGE", "SEVERITIES", "Finding", "Severity", "findings"]

CHECKS: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    does_not_fit,
    involuntary_replication,
    donation_failed,
    host_transfer,
    reduced_in_loop,
    repeated_in_loop,
    gathered_activation,
    gathered_weight,
    optimizer_less_divided,
    replicated_parameter,
    stack_gathered_whole,
    wide_collective,
    needless_permute,
    scatter_would_do,
)


def findings(step: Compiled) -> list[Finding]:
    """All of them, worst first."""
    found = dict.fromkeys(finding for check in CHECKS for finding in check(step))
    return sorted(found, key=lambda f: -SEVERITIES.index(f.severity))
