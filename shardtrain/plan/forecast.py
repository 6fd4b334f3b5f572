"""What a plan's step will need and take on hardware that need not be here: memory, FLOPs, bytes, seconds."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardtrain.errors import CompileError, ConfigError
from shardtrain.mesh import Target
from shardtrain.plan import aot, hlo
from shardtrain.plan.bill import Bill, bill
from shardtrain.plan.compiled import Memory, lower_step
from shardtrain.plan.cost import Constants, Cost, Sent, cost
from shardtrain.plan.layout import placement
from shardtrain.plan.minimum import minimum
from shardtrain.plan.paper import Work
from shardtrain.plan.partitioned import Partitioned, partition, unavailable
from shardtrain.plan.picture import fragment
from shardtrain.tree import bytes_text, flatten, table

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan

FAST = {"tpu": {"optimization_level": "O0"}}  # a fifth of the time; memory is within a third of what O2 needs


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one plan on one target. `flops`: per device and step, by `flops_source`; `model_flops`: those that MFU counts.

    `refused`: what the compiler said where it did not take the program. `sent`: bytes, by `source`.
    `placement`: where each parameter lives, see `layout.placement`. `recomputed`, `resent`: FLOPs and wire bytes that the
    compiler adds, by running products and collectives again where memory is short (XLA on GPUs: over about 80% of it).
    """

    target: Target
    mesh: Mapping[str, int]
    rules: str
    groups: int
    microbatches: int
    parameters: int
    bill: Bill
    flops: float | None
    model_flops: float | None
    sent: tuple[Sent, ...]
    cost: Cost | None
    tokens: int
    refused: str
    source: str
    flops_source: str
    placement: tuple[Mapping[str, Any], ...]
    recomputed: float = 0.0
    resent: float = 0.0

    @property
    def fits(self) -> bool | None:
        return False if self.refused else self.bill.fits

    @property
    def seconds(self) -> float | None:
        """Of one step, predicted."""
        return None if self.cost is None else self.cost.total

    @property
    def tokens_per_second(self) -> float | None:
        return None if not self.seconds else self.tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs of a step against what all devices could do in its time, in bf16."""
        if not self.seconds or not self.model_flops or self.target.chip is None:
            return None
        return self.model_flops / (self.seconds * self.target.size * self.target.chip.flops["bf16"])

    def price_per_billion(self, device_hour: float) -> float | None:
        """Of a billion tokens, in the unit of the price."""
        speed = self.tokens_per_second
        return None if speed is None else 1e9 / speed / 3600 * device_hour * self.target.size

    def as_json(self) -> dict[str, Any]:
        """See the README for the keys."""
        return {
            "target": self.target.name,
            "mesh": dict(self.mesh),
            "rules": self.rules,
            "groups": self.groups,
            "microbatches": self.microbatches,
            "parameters": self.parameters,
            "fits": self.fits,
            "refused": self.refused or None,
            "memory": self.bill.as_json(),
            "flops": self.flops,
            "flops_source": self.flops_source,
            "flops_recomputed": self.recomputed,
            "bytes_resent": self.resent,
            "model_flops": self.model_flops,
            "collectives": [
                {
                    "op": s.op,
                    "axis": "+".join(s.axes),
                    "link": self._link(s),
                    "count": s.count,
                    "wire_bytes": s.bytes,
                    "asynchronous_bytes": s.asynchronous,
                    "seconds": self.cost and self.cost.taken.get((s.op, "+".join(s.axes))),
                }
                for s in self.sent
            ],
            "step_seconds": None if self.cost is None else self.cost.as_json(),
            "step_source": None if self.cost is None else self.cost.source,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "source": self.source,
            "placement": list(self.placement),
        }

    def _repr_html_(self) -> str:
        return fragment(self.as_json())

    def _link(self, sent: Sent) -> str | None:
        names = dict.fromkeys(self.cost.links[a] for a in sent.axes if self.cost and a in self.cost.links)
        return "+".join(names) or None

    def __str__(self) -> str:
        mesh = " ".join(f"{a}={n}" for a, n in self.mesh.items())
        verdict = {True: "fits", False: "does not fit", None: "may fit"}[self.fits]
        parts = [
            f"{self.target}, mesh {mesh}, rules {self.rules}, {self.microbatches} microbatches: {verdict}"
            + (f" ({self.refused})" if self.refused else ""),
            f"{self.bill}\nmemory: {self.bill.source}",
        ]
        again = []
        if self.recomputed and self.flops:
            again.append(f"runs products again, {self.recomputed / self.flops:.1%} more FLOPs")
        if self.resent:
            total = sum(s.bytes for s in self.sent)
            again.append(f"sends again {bytes_text(self.resent)} of {bytes_text(total)}")
        if again:
            parts.append(f"memory is short: its compiler {', and '.join(again)}")
        if self.bill.largest:
            live = [(what, bytes_text(size)) for what, size in self.bill.largest[:6]]
            parts.append(table(("largest at the peak", "bytes"), live))
        rows = [
            ("+".join(s.axes), self._link(s) or "", s.op, f"{s.count:g}", bytes_text(s.bytes), _beside(s))
            for s in sorted(self.sent, key=lambda s: ("+".join(s.axes), s.op))
        ]
        if rows:
            header = ("axis", "link", "collective", "runs", "sent", "asynchronous")
            columns = len(header) - all(s.asynchronous is None for s in self.sent)
            parts.append(table(header[:columns], [row[:columns] for row in rows]))
        if self.cost is not None:
            terms = [("compute", self.cost.compute, ""), ("HBM, over compute", self.cost.hbm, "")]
            terms += [(a, self.cost.waited[a], f"of {t:.4g} s") for a, t in self.cost.axes.items()]
            terms += [("bubble", self.cost.bubble, "")] if self.cost.bubble else []
            shown = [(name, f"{t:.4g} s", more) for name, t, more in [*terms, ("step", self.cost.total, "")]]
            speed = f"{self.tokens_per_second:,.0f} tokens/s" + (f", MFU {self.mfu:.1%}" if self.mfu else "")
            parts.append(f"{table(('term', 'waited for', ''), shown)}\n{speed}\nseconds: {self.cost.source}")
        return "\n\n".join(parts)


def _beside(sent: Sent) -> str:
    return "" if sent.asynchronous is None or not sent.bytes else f"{sent.asynchronous / sent.bytes:.0%}"


def forecast(
    plan: Plan,
    target: Target,
    *,
    constants: Constants | None = None,
    model_flops: float | None = None,
    compile: str = "no",
    timeout: float = 600,
    paper: Partitioned | None = None,
) -> Forecast:
    """What a plan on the target's abstract mesh needs and takes; allocates nothing.

    Args:
        model_flops: of one step, for MFU.
        compile: `no`, `fast` (the target's compiler at its fast level) or `full` (as production would): memory and
            bytes are then the compiler's. Where that compiler is not installed it is `no`, and the sources say so.
        timeout: seconds for the compiler. paper: the plan, partitioned already.

    Raises:
        CompileError: the compiler died or took too long; not that it found too little memory.
    """
    constants = constants or Constants.of(target)
    paper = paper or (None if unavailable(plan.mesh.shape) else partition(plan, target))
    made = _of_paper(plan, target, constants, model_flops, paper)
    return (
        made
        if compile == "no" or paper is None
        else with_compiler(made, plan, paper, constants, compile, timeout)
    )


def _of_paper(
    plan: Plan, target: Target, constants: Constants, model_flops: float | None, paper: Partitioned | None
) -> Forecast:
    done: tuple[Work, ...]
    if paper is None:
        source = f"nothing was partitioned: {unavailable(plan.mesh.shape)}"
        sent = tuple(Sent(t.op, t.axes, t.bytes, 1) for t in minimum(plan))
        flops = None if model_flops is None else model_flops / target.size
        done = (
            () if flops is None else (Work("bf16" if plan.precision == "bf16" else "f32", flops, 0.0, 1.0),)
        )
    else:
        source, flops, done = paper.source, paper.flops, paper.work
        sent = totals(paper.collectives)
    return Forecast(
        target=target,
        mesh=dict(plan.mesh.shape),
        rules=plan.rules.name,
        groups=plan.groups,
        microbatches=plan.microbatches,
        parameters=plan.parameter_count,
        bill=bill(plan, target, paper, source),
        flops=flops,
        model_flops=model_flops,
        sent=sent,
        cost=cost(
            target,
            plan.mesh.shape,
            done,
            sent,
            bubble(plan),
            constants,
            source,
            0.0 if paper is None else paper.hosted,
        )
        if done
        else None,
        tokens=_tokens(plan),
        refused="",
        source=source,
        flops_source=source,
        placement=placement(plan.leaves, plan.mesh),
    )


def totals(collectives: hlo.Collectives, *, scheduled: bool = False) -> tuple[Sent, ...]:
    """By axis and kind. `scheduled`: by a compiler, so that it is known what may run beside them."""
    found: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for c in collectives:
        if c.axes:
            wire = c.wire_bytes
            found[c.op, c.axes] = [
                a + b
                for a, b in zip(found[c.op, c.axes], (wire, c.count, c.asynchronous * wire), strict=True)
            ]
    return tuple(
        Sent(op, axes, wire, count, beside if scheduled else None)
        for (op, axes), (wire, count, beside) in found.items()
    )


def bubble(plan: Plan) -> float:
    """Share of their time in which stages wait, as the program runs; 0 without stages."""
    return 0.0 if plan.pipeline is None else plan.pipeline.timeline().bubble


def _tokens(plan: Plan) -> int:
    fields = flatten(plan.batch)
    return math.prod(fields["tokens"].shape) if "tokens" in fields else plan.global_batch


def with_compiler(
    made: Forecast, plan: Plan, paper: Partitioned, constants: Constants, level: str, timeout: float
) -> Forecast:
    """With memory and bytes as the target's compiler has them; as it was where that compiler is not installed."""
    target = made.target
    try:
        lowered = lower_for(plan, target)
    except ConfigError as error:
        return dataclasses.replace(made, source=f"{made.source}; not compiled: {error.message}")
    return of_program(made, compile_lowered(lowered, made, level, timeout), paper, constants, plan)


def lower_for(plan: Plan, target: Target) -> Any:
    """The step on stand-ins for the target's devices, ready for its compiler.

    Raises:
        ConfigError: that compiler is not installed.
    """
    there = plan.on(aot.mesh_for(target, plan.mesh.shape))
    return lower_step(there, target.platform).compiler_ir("stablehlo")


def compile_lowered(lowered: Any, made: Forecast, level: str, timeout: float) -> aot.Program | CompileError:
    """The program, or that its compiler found too little memory.

    Raises:
        CompileError: anything else.
    """
    options = FAST.get(made.target.platform) if level == "fast" else None
    try:
        return aot.compile_for(lowered, made.target, made.mesh, options, timeout=timeout)
    except CompileError as error:
        if error.message.startswith("does not fit"):
            return error
        raise


def of_program(
    made: Forecast, program: aot.Program | CompileError, paper: Partitioned, constants: Constants, plan: Plan
) -> Forecast:
    """The forecast with the compiler's memory and bytes in it."""
    if isinstance(program, CompileError):
        return dataclasses.replace(
            made, refused=program.message, source=f"{made.source}; refused by its compiler"
        )
    memory = Memory(program.memory)
    sent, done, again, resent = made.sent, paper.work, 0.0, 0.0
    if made.target.platform != "cpu":  # which sends in float32 what others send in bf16
        read = hlo.read(program.as_text(), made.mesh)
        sent, again, resent = (
            totals(read.collectives, scheduled=not program.fast),
            read.recomputed,
            read.resent,
        )
    if again:
        done = (*done, Work("bf16" if plan.precision == "bf16" else "f32", again, 0.0, 1.0))
    new = dataclasses.replace(
        made.bill,
        temporaries=memory["temporaries"],
        peak=memory["peak"],
        host=memory.get("host", 0),
        source=program.source,
    )
    return dataclasses.replace(
        made,
        bill=new,
        sent=sent,
        cost=cost(made.target, made.mesh, done, sent, bubble(plan), constants, program.source, paper.hosted),
        source=program.source,
        recomputed=again,
        resent=resent,
    )
