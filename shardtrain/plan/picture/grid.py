"""Where every parameter lives: a table, and the devices in colour of the row that is chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.plan.picture.marks import Markup, escape, svg, table, tag
from shardtrain.tree import bytes_text

MOST, NUMBERED = 4096, 128  # devices that are drawn, and those with a number in them
_CELL, _GAP = 26.0, 8.0


def columns(mesh: Mapping[str, int]) -> int:
    """Devices in one line of the picture: the inner axes, as far as there is room, and of the next one a divisor."""
    total = math.prod(mesh.values())
    room, across = 16 if total <= 128 else 32 if total <= 512 else 64, 1
    for size in reversed(list(mesh.values())):
        if across * size > room:
            return across * max(n for n in range(1, room // across + 1) if size % n == 0)
        across *= size
    return across


def devices(mesh: Mapping[str, int]) -> str:
    """One square a device, in the order of the mesh, inner axes along the line. The page's script colours them."""
    sizes = list(mesh.values()) or [1]
    total, across = math.prod(sizes), columns(mesh)
    inner = sizes[-1] if sizes[-1] < across else across
    drawn = []
    width = across * _CELL + (across // inner - 1) * _GAP
    for number in range(min(total, MOST)):
        line, place = divmod(number, across)
        x = place * _CELL + place // inner * _GAP
        y = line * _CELL
        square = tag("rect", x=f"{x:g}", y=f"{y:g}", width=23, height=23, rx=3, class_="device")
        if total <= NUMBERED:
            square += tag("text", x=f"{x + 11.5:g}", y=f"{y + 15:g}", text_anchor="middle", class_="block")
        drawn.append(tag("g", tag("title") + square, data_device=number))
    height = -(-min(total, MOST) // across) * _CELL
    picture = svg(width, height, f"{total} devices, {across} in a line", drawn, class_="grid")
    named = " ".join(f"{axis}={n}" for axis, n in mesh.items())
    words = f"{total:,} devices, mesh {named}, {across} in a line"
    if total > MOST:
        words += f"; the first {MOST:,} are drawn"
    return tag(
        "figure", picture + tag("figcaption", escape(words)), class_="devices", data_mesh=json.dumps(mesh)
    )


def placement(rows: Sequence[Mapping[str, Any]], mesh: Mapping[str, int]) -> str:
    """Devices, and the table of parameters that can be filtered; a spec is a button that shows who holds what."""
    shown = [
        (
            Markup(tag("code", escape(row["path"]))),
            "×".join(map(str, row["shape"])) or "scalar",
            " ".join(axis or "." for axis in row["logical"]) if row["logical"] else "-",
            Markup(_button(row, "spec", "parameter")),
            Markup(_button(row, "gradient", "gradient")),
            Markup(_button(row, "optimizer", "optimizer's copies")),
            bytes_text(row["bytes"]),
        )
        for row in rows
    ]
    header = ("parameter", "shape", "logical axes", "placed", "gradient", "optimizer", "a device")
    field = tag("input", type="search", class_="filter", placeholder="filter: mlp fsdp", autocomplete="off")
    asked = tag("label", tag("span", "Parameters") + field) + tag(
        "span", f"{len(rows)} of {len(rows)}", class_="count"
    )
    return (
        devices(mesh)
        + tag("p", "", class_="chosen", aria_live="polite")
        + tag("p", asked, class_="asked")
        + table(header, shown, right=(6,), class_="placement")
    )


def _button(row: Mapping[str, Any], name: str, what: str) -> str:
    spec = row[name]
    return tag(
        "button",
        escape(spec),
        type="button",
        aria_pressed="false",
        data_spec=spec,
        data_shape=json.dumps(list(row["shape"])),
        data_name=f"{row['path']}, {what}",
    )
