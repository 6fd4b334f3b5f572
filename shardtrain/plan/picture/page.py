"""What `plan --json` or `search --json` says, as a page: no network, no ids, nothing that is not text in it.

Numbers are those of the object, none is computed again. A page may hold several pictures, and so may a notebook: the style and
the script know them by their class alone.
"""

from __future__ import annotations

import base64
import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from shardtrain.plan.picture.grid import placement
from shardtrain.plan.picture.marks import (
    Markup,
    escape,
    flops_text,
    label,
    number_text,
    seconds_text,
    table,
    tag,
)
from shardtrain.plan.picture.scatter import candidates, legend, scatter
from shardtrain.plan.picture.timeline import timeline
from shardtrain.plan.picture.treemap import STEP, parts, treemap
from shardtrain.tree import bytes_text

_HERE = pathlib.Path(__file__).parent
Found = Mapping[str, Any]
EXACT = "exact, from shapes and specs"


def page(found: Found, title: str) -> str:
    """A whole page, and a policy in it that forbids the browser any other source.

    Args:
        found: the object of `plan --json` (of one target or of several) or of `search --json`. title: any text.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        '<meta charset="utf-8">'
        + tag("meta", http_equiv="Content-Security-Policy", content=policy)
        + tag("meta", name="viewport", content="width=device-width, initial-scale=1")
        + '<link rel="icon" href="data:,">'  # none: a browser would ask the network for one
        + tag("title", escape(title))
    )
    body = _styled(tag("h1", escape(title)) + _body(found), script)
    return f'<!doctype html><html lang="en"><head>{head}</head><body class="whole">{body}</body></html>\n'


def fragment(found: Found) -> str:
    """The same for a cell of a notebook."""
    return _styled(_body(found), _file("page.js"))


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _styled(inside: str, script: str) -> str:
    return (
        f'<style>{_file("page.css")}</style><div class="shardtrain">{inside}</div><script>{script}</script>'
    )


def _body(found: Found) -> str:
    if "candidates" in found:
        return _search(found)
    if "targets" in found:
        return _targets(found)
    return _plan(found)


def _targets(found: Found) -> str:
    """Several targets: how it scales, then each."""
    rows = [
        (
            r["target"],
            f"{r['devices']:,}",
            seconds_text(r["step_seconds"]),
            f"{r['tokens_per_second']:,.0f}" if r["tokens_per_second"] else "-",
            *(f"{r[k]:.1%}" if r[k] else "-" for k in ("mfu", "strong", "weak")),
            _verdict(r["fits"]),
        )
        for r in found["scaling"]
    ]
    header = ("target", "devices", "step", "tokens/s", "MFU", "strong", "weak", "memory")
    words = (
        "Strong: tokens per second and device against the first target. Weak: the same at its rows a device."
    )
    each = "".join(
        tag("details", tag("summary", escape(r["target"])) + _plan(r), open="" if i == 0 else None)
        for i, r in enumerate(found["targets"])
    )
    return _section("Scaling", table(header, rows, right=range(1, 7)) + tag("p", words), "estimated") + each


def _plan(found: Found) -> str:
    memory, seconds = found["memory"], found.get("step_seconds")
    sections = [_facts(found), _memory(memory, found)]
    if seconds or found.get("collectives"):
        sections.append(_step(found, seconds))
    if found.get("placement"):
        rows = placement(found["placement"], found["mesh"])
        sections.append(_section("Where every parameter lives", rows, EXACT))
    if found.get("ways_to_fit"):
        ways = [
            (
                w["change"],
                w["layout"],
                bytes_text(w["peak"]),
                bytes_text(w["saves"]),
                seconds_text(w["step_seconds"]),
                "-" if w["costs"] is None else seconds_text(w["costs"]),
                Markup(label(w["source"])),
            )
            for w in found["ways_to_fit"]
        ]
        header = ("change", "layout", "peak", "saves", "step", "costs", "tier")
        fits = all(w.get("fits", True) for w in found["ways_to_fit"])
        title = "To make it fit" if fits else "Nothing that was tried fits; the nearest"
        sections.append(_section(title, table(header, ways, right=(2, 3, 4, 5)), ""))
    return "".join(sections)


def _facts(found: Found) -> str:
    """The numbers that one looks for first."""
    memory, seconds, step = found["memory"], found.get("step_seconds"), found.get("step_source") or ""
    mesh = " ".join(f"{axis}={n}" for axis, n in found["mesh"].items()) or "one device"
    usable = f"of {bytes_text(memory['usable'])} usable" if memory.get("usable") else "a device"
    source = memory.get("source") or found["source"]
    speed, mfu = found.get("tokens_per_second"), found.get("mfu")
    price, number = found.get("price_per_billion_tokens"), found["parameters"]
    shown = [
        ("memory", _verdict(found["fits"]), found.get("refused") or "", source),
        ("peak", bytes_text(memory["peak"]), usable, source),
        ("on the host", bytes_text(memory["host"]), "of a device", source) if memory.get("host") else None,
        ("step", seconds_text(seconds["total"]), "predicted", step) if seconds else None,
        ("speed", f"{speed:,.0f}", "tokens/s", step) if speed else None,
        ("MFU", f"{mfu:.1%}", "of peak in bf16", step) if mfu else None,
        ("a billion tokens", f"{price:,.2f}", "in the unit of the price", step) if price else None,
        ("parameters", number_text(number), f"{number:,}" if number >= 1e6 else "", EXACT),
        (
            "products",
            flops_text(found["flops"]),
            "a device and step",
            found["flops_source"],
        )
        if found.get("flops")
        and found.get("flops_source")  # without a target they are the model's, of all devices
        else None,
    ]
    cards = "".join(
        tag(
            "div",
            tag("dt", f"{escape(name)} {label(where)}")
            + tag("dd", tag("b", escape(value), class_=_wrong(value)) + tag("small", escape(more))),
        )
        for name, value, more, where in filter(None, shown)
    )
    words = f"{found['target']}, mesh {mesh}, rules {found['rules']}" + (
        f", {found['microbatches']} microbatches" if found.get("microbatches", 1) > 1 else ""
    )
    return tag("p", escape(words), class_="words") + tag("dl", cards, class_="facts")


def _wrong(value: str) -> str | None:
    return "wrong" if value == _verdict(False) else None


def _verdict(fits: bool | None) -> str:
    return {True: "fits", False: "does not fit", None: "may fit"}[fits]


def _memory(memory: Found, found: Found) -> str:
    source = memory.get("source") or found["source"]
    rows = []
    for part, pieces in parts(memory).items():
        whole = sum(size for _, size in pieces)
        where = source if part == STEP else EXACT
        if whole:
            rows.append((part, bytes_text(whole), f"{whole / memory['peak']:.1%}", Markup(label(where))))
    paper = found.get("flops_source") or source
    for name, words in (
        ("saved", "in it, saved for the backward"),
        ("gradients", "gradients, once all are made"),
    ):
        if memory.get(name):
            rows.append((words, bytes_text(memory[name]), "", Markup(label(paper))))
    rows.append(("peak", bytes_text(memory["peak"]), "100.0%", Markup(label(source))))
    shown = _figure(treemap(memory)) + table(("part", "bytes", "share", "tier"), rows, right=(1, 2))
    also = f" The tensors in it: {paper}." if memory.get("largest") and paper != source else ""
    return _section("Memory of one device", shown + tag("p", escape(f"{source}.{also}"), class_="source"), "")


def _step(found: Found, seconds: Found | None) -> str:
    rows = sorted(found.get("collectives") or [], key=lambda c: (c["axis"], -c["wire_bytes"]))
    source, step = found["source"], found.get("step_source") or ""
    shown = _figure(timeline(seconds, rows)) if seconds else ""
    if shown:
        shown += tag(
            "p",
            "The terms of the cost model, end to end; where in the step they fall is not predicted. Pale: beside compute, "
            "so not waited for.",
        )
    timed = any(c.get("seconds") for c in rows)  # without a target nobody knows the links
    scheduled = any(c.get("asynchronous_bytes") is not None for c in rows)  # by a compiler
    sent = [
        (
            c["axis"],
            c["op"],
            f"{c['count']:,g}",
            bytes_text(c["wire_bytes"]),
            *((f"{(c['asynchronous_bytes'] or 0) / (c['wire_bytes'] or 1):.0%}",) if scheduled else ()),
            Markup(label(source)),
            *((c.get("link") or "-", seconds_text(c.get("seconds")), Markup(label(step))) if timed else ()),
        )
        for c in rows
    ]
    header = (
        *("axis", "collective", "runs", "sent", *(("asynchronous",) if scheduled else ())),
        *("tier", *(("link", "takes", "tier") if timed else ())),
    )
    right = (2, 3, 4, 7) if scheduled else (2, 3, 6)
    shown += table(header, sent, right=right) if sent else tag("p", "Nothing is sent.")
    return _section("The step and what it sends", shown + _said(source, step), "")


def _search(found: Found) -> str:
    rows, best, front = found["candidates"], found["best"], found["pareto"]
    counts = found["counts"]
    usable = found.get("usable")
    words = [found["words"], *found["notes"]]
    reached = ", ".join(f"{counts[t]:,} {t}" for t in ("sketched", "partitioned", "compiled", "certified"))
    words.append(
        f"{counts['dropped']:,} layouts of {found['target']} by {found['objective']}: {reached}, in {found['seconds']:.0f} s. "
        "Seconds are estimates in every tier."
    )
    said = "".join(tag("p", escape(w), class_="words" if i == 0 else None) for i, w in enumerate(words))
    drawn = _figure(legend() + scatter(rows, front, usable, None if best is None else best["layout"]))
    filters = tag(
        "label",
        tag("span", "Layouts")
        + tag("input", type="search", class_="filter", placeholder="filter: fsdp remat", autocomplete="off"),
    ) + tag("span", f"{len(rows)} of {len(rows)}", class_="count")
    listed = tag("p", filters, class_="asked") + candidates(rows, front)
    every = "All layouts" if len(rows) == counts["dropped"] else f"The first {len(rows):,}"
    shown = said + drawn + tag("details", tag("summary", f"{every}, and why each lost") + listed, open="")
    winner = found.get("winner")
    after = tag("h2", f"The winner: {escape(best['layout'])}") + _plan(winner) if winner and best else ""
    return _section("Layouts", shown, "") + after


def _said(*sources: str) -> str:
    said: Iterable[str] = dict.fromkeys(s for s in sources if s)
    return tag("p", escape(". ".join(said)), class_="source")


def _figure(drawn: str) -> str:
    """A picture, and a line that says what the pointer or the keyboard is on."""
    return tag(
        "figure",
        drawn + tag("figcaption", "Point at a part, or walk with the arrow keys.", class_="detail"),
        class_="picture",
        aria_live="polite",
    )


def _section(title: str, inside: str, source: str) -> str:
    named = f"{escape(title)} {label(source)}" if source else escape(title)
    return tag("section", tag("h2", named) + inside)
