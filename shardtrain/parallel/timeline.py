"""How long a schedule takes, how idle it leaves its stages, and a picture of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from shardtrain.parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule
from shardtrain.parallel.ticks import lower


@dataclasses.dataclass(frozen=True)
class Costs:
    """Time of one whole stage for one microbatch, in any unit; a chunk takes its part. `link`: of one transfer.

    A stage's own gradient of a product costs what the product does, for its input and for its weights each.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    link: float = 0.0

    def of(self, op: str) -> float:
        """Of one op."""
        whole = self.backward_input + self.backward_weight
        return {
            FORWARD: self.forward,
            BACKWARD: whole,
            INPUT: self.backward_input,
            WEIGHT: self.backward_weight,
        }[op]

    def executed(self, op: str) -> float:
        """Of one op in our program, which keeps nothing of a forward but its input: a backward runs the forward again, and
        one of weights alone the backward of inputs too."""
        again = self.forward + self.backward_input
        whole = again + self.backward_weight
        return {FORWARD: self.forward, BACKWARD: whole, INPUT: again, WEIGHT: whole}[op]


class Span(NamedTuple):
    """`stage` is busy from `start` to `end`."""

    start: float
    end: float
    stage: int
    op: str
    microbatch: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What every stage does when. `in_flight`: stage -> most inputs kept for backwards at one time."""

    name: str
    stages: int
    spans: tuple[Span, ...]
    in_flight: tuple[int, ...]

    @property
    def total(self) -> float:
        """Time from the first start to the last end."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        return 1 - sum(span.end - span.start for span in self.spans) / (self.stages * self.total)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 100) -> str:
        """One line per stage, for a terminal: forwards as digits, backwards as letters, waiting as dots.

        A backward of inputs is a lower-case letter, of weights an upper-case one.
        """
        count = max(
            1, min(width, round(self.total / min(s.end - s.start for s in self.spans if s.end > s.start)))
        )
        lines = [f"{self.name}: bubble {self.bubble:.1%}, at most {max(self.in_flight)} inputs kept"]
        for stage in range(self.stages):
            own = [s for s in self.spans if s.stage == stage]
            cells = []
            for i in range(count):
                middle = (i + 0.5) * self.total / count
                here = next((s for s in own if s.start <= middle < s.end), None)
                cells.append("." if here is None else _letter(here))
            lines.append(f"stage {stage:<2} {''.join(cells)}")
        return "\n".join(lines)

    def svg(self) -> str:
        """The same as a picture: blue forward, orange backward, green backward of weights, and the microbatch's number."""
        return _svg(self)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """The schedule on stages that run each on its own and wait only for what they need.

    With v chunks, costs are of all chunks together. The bubble is (p-1)/(m+p-1) for GPipe and 1F1B, (p-1)/(vm+p-1)
    interleaved, and of ZB-H1 about a third of 1F1B's. Held to it by tests/unit/parallel/test_schedules.py.
    """
    costs = costs or Costs()
    free = [0.0] * schedule.stages
    ready: dict[tuple[str, int, int], tuple[float, int]] = {}
    spans = []
    for row in sorted(schedule.rows):
        arrivals = [ready[need] for need in schedule.needs(row)]
        start = max([free[row.stage], *(t + (costs.link if s != row.stage else 0.0) for t, s in arrivals)])
        end = start + costs.of(row.op) / schedule.chunks
        free[row.stage] = end
        ready[schedule.does(row)] = (end, row.stage)
        spans.append(Span(start, end, row.stage, row.op, row.microbatch, row.chunk))
    return Timeline(schedule.name, schedule.stages, tuple(spans), tuple(schedule.in_flight()))


@functools.lru_cache(maxsize=256)  # a search asks for the same few again and again
def realise(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """The schedule as our one program runs it: in ticks, each as long as its busiest stage (see `parallel/ticks.py`).

    Results arrive with the next tick. `costs` are those of the stage's mathematics; what the program computes again is
    added (`Costs.executed`), so compare the totals of two schedules, not their bubbles: `zb` has less of a bubble
    than `1f1b` and takes longer, because each half of a backward runs the forward again.
    """
    costs = costs or Costs()
    ticks = lower(schedule)
    spans, now = [], 0.0
    for tick in ticks.rows:
        length = 0.0
        for stage, rows in enumerate(tick):
            at = now
            for row in rows:
                end = at + costs.executed(row.op) / schedule.chunks
                spans.append(Span(at, end, stage, row.op, row.microbatch, row.chunk))
                at = end
            length = max(length, at - now)
        now += length + costs.link
    kept = (ticks.inputs,) * schedule.stages
    return Timeline(f"{schedule.name}, as it runs", schedule.stages, tuple(spans), kept)


def _letter(span: Span) -> str:
    if span.op == FORWARD:
        return str(span.microbatch % 10)
    letter = "abcdefghij"[span.microbatch % 10]
    return letter.upper() if span.op == WEIGHT else letter


COLOURS = {FORWARD: "#7aa6da", BACKWARD: "#e8a15c", INPUT: "#e8a15c", WEIGHT: "#8fbf7f"}
SHADES = {FORWARD: "#4f7fb8", BACKWARD: "#c67d35", INPUT: "#c67d35", WEIGHT: "#659957"}


def _svg(timeline: Timeline) -> str:
    left, top, high, wide = 70, 46, 26, 1000
    scale = wide / timeline.total
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 20}" '
        f'height="{top + high * timeline.stages + 40}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{timeline.name}: {timeline.stages} stages, bubble '
        f"{timeline.bubble:.1%}, at most {max(timeline.in_flight)} inputs kept</text>",
    ]
    for stage in range(timeline.stages):
        y = top + high * stage
        parts.append(f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">stage {stage}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{wide}" height="{high - 3}" fill="#eeeeee"/>')
    for span in timeline.spans:
        x, y = left + span.start * scale, top + high * span.stage
        width = (span.end - span.start) * scale
        fill = (SHADES if span.chunk % 2 else COLOURS)[span.op]
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{high - 3}" fill="{fill}" stroke="white" '
            f'stroke-width="0.7"><title>{span.op} of microbatch {span.microbatch}, chunk {span.chunk}</title></rect>'
        )
        if width > 14:
            parts.append(
                f'<text x="{x + width / 2:.2f}" y="{y + 16}" text-anchor="middle" font-size="10">{span.microbatch}</text>'
            )
    y, x = top + high * timeline.stages + 22, left
    drawn = {span.op for span in timeline.spans}
    names = {
        FORWARD: "forward",
        BACKWARD: "backward",
        INPUT: "backward of inputs",
        WEIGHT: "backward of weights",
    }
    for op in (op for op in names if op in drawn):
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[op]}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{names[op]}</text>')
        x += 40 + 8 * len(names[op])
    if any(span.chunk for span in timeline.spans):
        parts.append(f'<text x="{x}" y="{y}">darker: every other chunk</text>')
    return "\n".join([*parts, "</svg>", ""])
