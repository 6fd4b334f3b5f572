"""What every picture is made of: escaped elements, units, and the label that says where a number comes from."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

WIDE, NARROW = (
    920,
    400,
)  # pixels: every picture is drawn for both, the page shows the one that there is room for
LETTER, BOLD = 7.2, 8.0  # width of a letter of 12 pixels, on the safe side
_VOID = ("input", "meta")
_TIERS = {"counted": "compiled"}


def escape(value: Any) -> str:
    """Text, wherever it stands."""
    return html.escape(str(value), quote=True)


def tag(name: str, inside: str = "", /, **attributes: Any) -> str:
    """An element; `inside` is markup already, attributes are escaped here. `class_` is class, `a_b` is a-b; None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{v:.1f}" if isinstance(v, float) else v)}"'
        for key, v in attributes.items()
        if v is not None
    )
    return f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inside}</{name}>"


def text(x: float, y: float, words: Any, **attributes: Any) -> str:
    return tag("text", escape(words), x=float(x), y=float(y), **attributes)


def svg(width: float, height: float, label: str, inside: Iterable[str], **attributes: Any) -> str:
    return tag(
        "svg",
        "".join(inside),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        role="img",
        aria_label=label,
        **attributes,
    )


def both(draw: Callable[[float], str]) -> str:
    """The picture for a wide and for a narrow window; the style shows one of them."""
    return tag("div", draw(WIDE), class_="wide") + tag("div", draw(NARROW), class_="narrow")


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = (), class_: str = ""
) -> str:
    """Rows of cells; a cell that starts with `<` is markup already, all others are escaped. `right`: columns of numbers."""
    side = lambda i: "number" if i in right else None  # noqa: E731
    cell = lambda v: v.markup if isinstance(v, Markup) else escape(v)  # noqa: E731
    head = "".join(tag("th", escape(name), scope="col", class_=side(i)) for i, name in enumerate(header))
    body = "".join(
        tag("tr", "".join(tag("td", cell(v), class_=side(i)) for i, v in enumerate(row))) for row in rows
    )
    inside = tag("table", tag("thead", tag("tr", head)) + tag("tbody", body), class_=class_ or None)
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label="table")


class Markup:
    """Markup that is escaped already, to stand in a cell."""

    def __init__(self, markup: str):
        self.markup = markup


def tier(source: str) -> str:
    """`compiled`, `partitioned`, `estimated`, `sketched`, ...: a source in one word."""
    first = source.split(" ", maxsplit=1)[0].rstrip(":,;") or "unknown"
    return _TIERS.get(first, first)


def label(source: str) -> str:
    """Of a number: its tier, and on hover where it comes from."""
    return tag("span", escape(tier(source)), class_=f"tier {tier(source)}", title=source)


def seconds_text(value: float | None) -> str:
    """`2.78 s`, `108 ms`, `34 µs`."""
    if value is None:
        return "-"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:,.0f} {unit}"
    return "0 s" if not value else f"{value / 1e-9:.3g} ns"


def flops_text(value: float) -> str:
    """`1.93 PFLOP`."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}FLOP"
    return f"{value:,.0f} FLOP"


def number_text(value: float) -> str:
    """`8.03 billion`."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,}"


def fitted(words: str, width: float, letter: float = LETTER) -> str:
    """As much of a text as has room; nothing where that says nothing."""
    most = int(width / letter)
    return words if len(words) <= most else f"{words[: most - 1]}…" if most >= 6 else ""


def steps(low: float, high: float, logarithmic: bool, most: int) -> list[float]:
    """Round numbers between two, for an axis."""
    if logarithmic:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for some in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**t for t in tens for m in some if low <= m * 10.0**t <= high]
            if len(found) <= most:
                break
        return found
    rough = (high - low) / most or 1.0
    size = 10 ** math.floor(math.log10(rough))
    size *= next(m for m in (1, 2, 5, 10) if rough <= m * size)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]
