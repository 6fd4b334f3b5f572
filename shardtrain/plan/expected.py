"""`assert_collectives`: a user's own test of what a step sends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import EllipsisType
from typing import TYPE_CHECKING

from shardtrain.errors import ConfigError, suggestion
from shardtrain.plan.hlo import KINDS, Collective, Collectives
from shardtrain.tree import bytes_text

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled

Wanted = int | range | str | EllipsisType
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES = re.compile(r"\s*(<=|)\s*([\d.]+)\s*(B|KiB|MiB|GiB|TiB)\s*")
CLOSE = 0.02  # of a number of bytes: text rounds
SHOWN = 5


def assert_collectives(
    step: Compiled | Collectives, expected: Mapping[str, Wanted], *, ignore_below: int = 4096
) -> None:
    """Fail unless a compiled step sends exactly what is named, by operation and mesh axis; for tests of one's own.

        step = plan.compile()
        st.assert_collectives(step, {
            "all-gather over fsdp": 24,                   # runs a step, loops multiplied
            "reduce-scatter over fsdp": range(12, 25),    # 12 to 24 runs
            "all-reduce over data": "864 KiB",            # bytes that one device sends a step, within 2%
            "all-reduce over tensor": "<= 18 MiB",        # or at most so many
            "all-to-all over expert": ...,                # whatever it is
        })

    What is not named must not be there: `{}` says that nothing is sent. Runs depend on what a compiler puts together, so
    bytes hold longer across versions of JAX and across targets. On the CPU, 16-bit values are sent as float32: a
    test of bf16 bytes wants `plan.compile(target=...)`.

    Args:
        step: anything compiled by a plan (`plan.compile`, `plan.jit`), for the devices that are here or for a target, or
            its `collectives()`.
        expected: `"OPERATION over AXIS"` (axes joined as `data+fsdp`, in mesh order) -> runs, bytes, or `...`.
        ignore_below: collectives of fewer bytes a run that are not named are left out: losses and norms travel in a few
            bytes, and how is the compiler's affair.

    Raises:
        AssertionError: a diff, with the lines of the model that send what was not expected, and the mapping that would
            have passed.
        ConfigError: a key or value that says nothing.
    """
    axes = None if isinstance(step, Collectives) else list(step.plan.mesh.shape)
    for key, wanted in expected.items():
        _check(key, wanted, axes)
    found: dict[str, list[Collective]] = {}
    for c in step if isinstance(step, Collectives) else step.collectives():
        if c.axes:
            found.setdefault(f"{c.op} over {c.axis}", []).append(c)
    for key in [k for k in found if k not in expected]:
        found[key] = [c for c in found[key] if c.bytes >= ignore_below]
        if not found[key]:
            del found[key]
    wrong = [key for key in {**expected, **found} if not _fits(expected.get(key), found.get(key, []))]
    if wrong:
        raise AssertionError(_diff(step, wrong, expected, found))


def _check(key: str, wanted: Wanted, axes: list[str] | None) -> None:
    op, _, over = key.partition(" over ")
    if " over " not in key or op not in KINDS:
        raise ConfigError(
            "says no collective",
            where=f"assert_collectives '{key}'",
            fix=f"'OPERATION over AXIS'; {suggestion(op, KINDS, 'an axis of the mesh')}",
        )
    for axis in over.split("+"):
        if axes is not None and axis not in axes:
            raise ConfigError(
                f"no mesh axis '{axis}'",
                where=f"assert_collectives '{key}'",
                fix=suggestion(axis, axes, "several in mesh order, such as data+fsdp"),
            )
    if isinstance(wanted, str) and not _BYTES.fullmatch(wanted):
        raise ConfigError(
            f"'{wanted}' is no number of bytes",
            where=f"assert_collectives '{key}'",
            fix="'1.5 MiB', or '<= 1.5 MiB'",
        )


def _fits(wanted: Wanted | None, found: list[Collective]) -> bool:
    runs, sent = sum(c.count for c in found), sum(c.wire_bytes for c in found)
    if wanted is None:
        return not found
    if isinstance(wanted, int):
        return runs == wanted
    if isinstance(wanted, range):
        return runs in wanted
    if isinstance(wanted, str):
        match = _BYTES.fullmatch(wanted)
        assert match is not None
        least, value = match.group(1), float(match.group(2)) * _UNITS[match.group(3)]
        return sent <= value * (1 + CLOSE) and (bool(least) or sent >= value * (1 - CLOSE))
    return True


def _diff(
    step: Compiled | Collectives,
    wrong: list[str],
    expected: Mapping[str, Wanted],
    found: Mapping[str, list[Collective]],
) -> str:
    where = "" if isinstance(step, Collectives) else f" of {step.target or step.platform}"
    lines = [f"collectives{where} are not those expected"]
    for key in wrong:
        some = found.get(key, [])
        mark = "-" if not some else "+" if key not in expected else "!"
        lines.append(f"{mark} {key}: expected {_wanted(expected.get(key))}, found {_found(some)}")
        some = sorted(some, key=lambda c: -c.wire_bytes)
        for c in some[:SHOWN]:
            what = c.op_name.rsplit("/", 1)[-1]
            lines.append(
                f"    {bytes_text(c.wire_bytes)}  {c.shape}, {c.count} x  {c.source}  {what}".rstrip()
            )
        if len(some) > SHOWN:
            lines.append(f"    and {len(some) - SHOWN} more")
    mapping = ", ".join(f'"{key}": {sum(c.count for c in some)}' for key, some in sorted(found.items()))
    lines.append(f"  try: print(st.audit(step)) says why; if it is meant: {{{mapping}}}")
    return "\n".join(lines)


def _wanted(wanted: Wanted | None) -> str:
    if wanted is None:
        return "none"
    if isinstance(wanted, range):
        return f"{wanted.start} to {wanted.stop - 1} runs"
    return f"{wanted} run{'s' * (wanted != 1)}" if isinstance(wanted, int) else str(wanted)


def _found(some: list[Collective]) -> str:
    if not some:
        return "none"
    runs = sum(c.count for c in some)
    return f"{runs} run{'s' * (runs != 1)}, {bytes_text(sum(c.wire_bytes for c in some))}"
