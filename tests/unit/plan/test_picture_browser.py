"""The page in a real browser: what it draws, what it says when one points at it, and that it is quiet otherwise."""

import itertools
import json

import jax
import pytest
from browser import NAMES, Browser, installed
from jax.sharding import NamedSharding, PartitionSpec
from picture_made import found, made
from test_picture import NASTY

import shardtrain as st
from shardtrain.plan.picture import fragment, page
from shardtrain.plan.picture.marks import NARROW

pytestmark = pytest.mark.skipif(
    installed() is None, reason=f"no browser here: install one of {', '.join(NAMES)} (apt install chromium)"
)
SEEN = "(() => { const box = e => { const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] }; return %s })()"
ROWS = "Array.from(document.querySelectorAll('%s tbody tr')).filter(r => !r.hidden).length"


@pytest.fixture(scope="module")
def browser():
    opened = Browser(installed())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> a file of it."""
    folder = tmp_path_factory.mktemp("pages")
    forecasts = {n: made(n)[1].as_json() for n in ("data2-fsdp2-tensor2", "data8+zero1", "stage2-data4+x2")}
    texts = {name: page(found, name) for name, found in forecasts.items()}
    texts["search"] = page(found().as_json(), "search")
    cells = "".join(fragment(f) for f in list(forecasts.values())[:2])
    texts["cells"] = f"<!doctype html><meta charset=utf-8>{cells}"
    bad = json.loads(json.dumps(forecasts["data2-fsdp2-tensor2"]))
    bad["placement"][0]["path"] = bad["memory"]["largest"][0][0] = bad["source"] = NASTY
    bad["memory"]["held"]["parameters"] = {NASTY: bad["memory"]["parameters"]}
    texts["nasty"] = page(bad, f"shardtrain plan {NASTY}")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return lambda name: folder / f"{name}.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1100, 640, 360])
@pytest.mark.parametrize("name", ["data2-fsdp2-tensor2", "search"])
def test_it_draws_and_is_quiet(browser, pages, name, width, dark):
    """No error, no request, no text over another, nothing wider than the window, in one size alone; letters stand out.

    Failed once each with a script that threw, an image from elsewhere, and labels of an axis that met.
    """
    browser.open(pages(name), width=width, dark=dark)
    assert not browser.problems
    assert browser.run("document.documentElement.scrollWidth") <= width
    drawn = browser.run(
        SEEN % "Array.from(document.querySelectorAll('svg')).filter(s => box(s)[2]).map(s => "
        "[box(s), s.querySelectorAll('rect, path, circle, line').length, "
        "Array.from(s.querySelectorAll('text')).filter(t => t.textContent).map(t => [t.textContent, ...box(t)])])"
    )
    pictures = [(box, texts) for box, marks, texts in drawn if texts]
    assert len(pictures) == {"search": 4}.get(name, 3)  # scatter, areas, lanes, devices
    assert all(marks for _, marks, _ in drawn)
    for (left, _, wide, _), texts in pictures:
        for (one, x, y, w, h), (other, a, b, v, g) in itertools.combinations(texts, 2):
            meet = min(x + w, a + v) - max(x, a) > 0.5 and min(y + h, b + g) - max(y, b) > 3
            assert not meet, (one, other)
        assert not [t for t in texts if t[1] < left - 2 or t[1] + t[3] > left + wide + 2]
    assert all(h > 8 for _, texts in pictures for _, _, _, _, h in texts) or width < NARROW
    style = lambda what, part: browser.run(f"getComputedStyle(document.querySelector('{what}')).{part}")
    front, back = style(".shardtrain", "color"), style(".shardtrain", "backgroundColor")
    assert _contrast(front, back) > 7 and _contrast(style(".source", "color"), back) > 4.5
    assert (_light(back) < 0.1) is dark


def _light(colour):
    red, green, blue = (int(n) / 255 for n in colour[4:-1].split(",")[:3])
    line = lambda c: c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    return 0.2126 * line(red) + 0.7152 * line(green) + 0.0722 * line(blue)


def _contrast(one, other):
    high, low = sorted((_light(one), _light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["data2-fsdp2-tensor2", "data8+zero1", "stage2-data4+x2"])
def test_colours_are_jax_own_placement(browser, pages, name):
    """For every parameter, its gradient and its optimizer state: devices have one block in the page where JAX puts one
    part of the array on them. Failed once with the axes of a mesh unravelled inner first.
    """
    plan, forecast = made(name)
    mesh = st.make_mesh(**dict(plan.mesh.shape))
    browser.open(pages(name))
    blocks = json.loads(
        browser.run(
            "JSON.stringify(Array.from(document.querySelectorAll('[data-spec]')).map(button => { button.click();"
            "return Array.from(document.querySelectorAll('[data-device]')).map(d => [d.dataset.block, "
            "d.querySelector('title').textContent.split(', [')[1]]) }))"
        )
    )
    wanted = [
        (leaf, spec) for leaf in plan.leaves.values() for spec in (leaf.spec, leaf.gradient, leaf.optimizer)
    ]
    assert len(blocks) == len(wanted) == 3 * len(forecast.placement)
    divided = 0
    for shown, (leaf, spec) in zip(blocks, wanted, strict=True):
        parts = NamedSharding(mesh, PartitionSpec(*spec)).devices_indices_map(leaf.shape)
        held = [parts[d] for d in mesh.devices.flat]
        ranges = [
            ", ".join(":" if s.start is None else f"{s.start}:{s.stop}" for s in device) for device in held
        ]
        assert [text.rstrip("]") for _, text in shown] == ranges, leaf.path
        same = [[a == b for b in ranges] for a in ranges]
        assert [[a == b for b, _ in shown] for a, _ in shown] == same
        divided += len(set(ranges)) > 1
    assert divided > 3 and jax.device_count() == 8


def test_filter_and_choice(browser, pages):
    """Rows that have all the words are left, and counted; a choice is said in words and coloured.

    Failed once with the header's row counted.
    """
    browser.open(pages("data2-fsdp2-tensor2"))
    rows = made()[1].placement
    words = "mlp kernel"
    wanted = sum(all(w in json.dumps(row) for w in words.split()) for row in rows)
    browser.run(
        f"(() => {{ const f = document.querySelector('.filter'); f.value = '{words.upper()}';"
        "f.dispatchEvent(new Event('input')) })()"
    )
    assert browser.run(ROWS % ".placement") == wanted > 0
    assert browser.run("document.querySelector('.count').textContent") == f"{wanted} of {len(rows)}"
    said = "document.querySelector('.chosen').textContent"
    assert "blocks" in browser.run(said)
    browser.run("document.querySelector('[data-spec=\"whole\"]').click()")
    assert "whole on every device" in browser.run(said)
    fills = "new Set(Array.from(document.querySelectorAll('[data-device] rect')).map(r => r.style.fill)).size"
    assert browser.run(fills) == 1
    assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 1


def test_losers_say_why(browser, pages):
    """With the pointer and with the keyboard, in the table's words. Failed once with the row of the table's head."""
    search = found()
    browser.open(pages("search"))
    shown = ".picture .wide [data-row]"
    count = browser.run(f"document.querySelectorAll('{shown}').length")
    assert count == sum(bool(e.seconds and e.peak) for e in search.entries)
    for number in range(count):
        row, x, y = browser.run(
            SEEN % f"(p => [Number(p.dataset.row), box(p)[0] + box(p)[2] / 2, box(p)[1] + box(p)[3] / 2])"
            f"(document.querySelectorAll('{shown}')[{number}])"
        )
        top = browser.run(f"Number(document.elementFromPoint({x}, {y}).dataset.row ?? -1)")
        if top != row:
            continue  # another point lies over it
        browser.point(x, y)
        said = browser.run("document.querySelector('.detail').textContent")
        entry = search.entries[row]
        assert said.startswith(entry.name) and said.endswith(f"{entry.why.strip()}") and entry.why
    browser.run("document.querySelector('.picture .wide svg').focus()")
    first = browser.run("document.querySelector('.detail').textContent")
    browser.key("ArrowRight")
    second = browser.run("document.querySelector('.detail').textContent")
    names = [e.name for e in search.entries]
    assert first != second and all(any(s.startswith(n) for n in names) for s in (first, second))
    tiers = browser.run(
        f"Array.from(document.querySelectorAll('{shown}')).map(p => p.getAttribute('class')).join()"
    )
    assert "sketched" in tiers and "partitioned" in tiers and "best" in tiers


def test_two_cells_do_not_meet(browser, pages):
    """A choice in one picture leaves the other as it is. Failed once with a script that asked the whole document."""
    browser.open(pages("cells"))
    assert not browser.problems
    state = "Array.from(document.querySelectorAll('.shardtrain')).map(r => r.querySelector('.chosen').textContent)"
    before = browser.run(state)
    browser.run(
        "Array.from(document.querySelectorAll('.shardtrain')[1].querySelectorAll('[data-spec]')).at(-1).click()"
    )
    after = browser.run(state)
    assert len(before) == 2 and all(before) and before[0] == after[0] and before[1] != after[1]
    assert browser.run("document.querySelectorAll('[id]').length") == 0


def test_names_do_nothing(browser, pages):
    """Markup in a config's path, a parameter's and a tensor's name is shown, not run.

    Failed once with a name that the script wrote as markup.
    """
    browser.open(pages("nasty"))
    assert browser.run("String(window.hit)") == "undefined" and not browser.problems
    assert NASTY in browser.run("document.querySelector('h1').textContent")
    assert NASTY in browser.run("document.title")
    browser.run("document.querySelector('[data-spec]').click()")
    assert NASTY in browser.run("document.querySelector('.chosen').textContent")
    assert browser.run("document.querySelectorAll('img, script').length") == 1
    assert browser.run("String(window.hit)") == "undefined"
