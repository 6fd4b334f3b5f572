"""The report is one page that needs nobody, and its curve shows what was measured."""

import html.parser
import math
import re
import xml.etree.ElementTree as ET

from shardtrain.monitor import loss_svg, sparkline, write_report
from shardtrain.monitor.report import MOST

SVG = "{http://www.w3.org/2000/svg}"


def polyline(svg: str, kind: str) -> list[tuple[float, float]]:
    (found,) = [e for e in ET.fromstring(svg).iter(f"{SVG}polyline") if e.get("class") == kind]
    return [tuple(map(float, pair.split(","))) for pair in found.get("points", "").split()]


class Page(html.parser.HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


HOSTILE = '<script>alert("1")</script> & <img src=http://evil.example/x onerror=y>'


def test_report_fetches_nothing_and_escapes_everything(tmp_path):
    """Every text of a run may be hostile: a generated sample is. Failed once with the sample unescaped,
    and once with the title."""
    path = write_report(
        tmp_path / "report.html",
        title=HOSTILE,
        curve=loss_svg([(1, 2.0)], levels={HOSTILE: 1.0}, title=HOSTILE),
        facts={HOSTILE: HOSTILE},
        memory={HOSTILE: 1024, "peak": 4096},
        layout=HOSTILE,
        collectives=HOSTILE,
        sample=HOSTILE,
    )
    text = path.read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action", "data"} & names
    assert not {n for n in names if n.startswith("on")}
    assert not re.search(r"url\(|@import", text)
    # what is left of addresses is escaped text and the name of the SVG standard
    assert {v for _, v in page.attributes if v and "://" in v and "evil" not in v} == {
        "http://www.w3.org/2000/svg"
    }
    assert text.count("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp;") >= 8


def test_memory_bars_are_to_scale(tmp_path):
    """Failed once with the sum instead of the largest as the whole."""
    path = write_report(tmp_path / "r.html", title="t", curve="", facts={}, memory={"a": 1024, "b": 4096})
    assert re.findall(r'style="width:([\d.]+)%"', path.read_text()) == ["25.0", "100.0"]
    assert "1.0 KiB" in path.read_text() and "4.0 KiB" in path.read_text()


def test_curve_places_points_by_their_numbers():
    """Equal distances in the data are equal on the picture, up is more. Failed once with y upside down."""
    svg = loss_svg([(0, 4.0), (50, 3.0), (100, 2.0)], [(100, 2.0)], levels={"unigram": 3.0}, title="a <b>")
    (x0, y0), (x1, y1), (x2, y2) = polyline(svg, "train")
    assert x1 - x0 == x2 - x1 > 0 and abs((y1 - y0) - (y2 - y1)) < 0.2 and y2 > y1 > y0
    tree = ET.fromstring(svg)
    (level,) = [e for e in tree.iter(f"{SVG}line") if e.get("class") == "level"]
    assert float(level.get("y1", "")) == y1
    assert polyline(svg, "eval") == [(x2, y2)]
    texts = [e.text for e in tree.iter(f"{SVG}text")]
    assert {"a <b>", "step", "nats", "0", "100", "unigram 3.000", "training 2.000", "held out 2.000"} <= {
        *texts
    }


def test_the_mean_does_not_lag():
    """On a straight line it is that line. Failed once with a mean over the past."""
    svg = loss_svg([(i, 5 - i / 100) for i in range(400)])
    for (x, y), (mx, my) in zip(polyline(svg, "train"), polyline(svg, "smooth"), strict=True):
        assert x == mx and abs(y - my) <= 0.11


def test_the_mean_does_not_end_on_noise():
    """At both ends it is near the truth, not at the last value. Failed once with a mean that narrows down
    to one point, which drew a hook at the end of every curve."""
    points = [(i, 5 - i / 200 + (0.5 if i % 2 else -0.5)) for i in range(400)]
    ends = lambda svg, kind: [polyline(svg, kind)[i][1] for i in (0, 1, -2, -1)]
    (y0, y1, y2, y3), noisy = ends(loss_svg(points), "smooth"), ends(loss_svg(points), "train")
    assert abs(y0 - y1) < 0.1 * abs(noisy[0] - noisy[1]) and abs(y2 - y3) < 0.1 * abs(noisy[2] - noisy[3])


def labels(svg: str) -> dict[str, tuple[float, float]]:
    return {
        e.text or "": (float(e.get("x", "")), float(e.get("y", "")))
        for e in ET.fromstring(svg).iter(f"{SVG}text")
    }


def test_labels_of_near_levels_do_not_overlap():
    """In the order of their values. Failed once with both at the height of their lines."""
    found = labels(loss_svg([(1, 5.0), (9, 1.0)], levels={"c": 3.0, "b": 2.01, "a": 2.0}))
    a, b, c = (found[t][1] for t in ("a 2.000", "b 2.010", "c 3.000"))
    assert a - b >= 14 and b - c >= 14


def test_ticks_fit_their_places():
    """Whole steps, long numbers cut short, a long title too; tiny losses keep digits.

    Failed once with steps 0.2, 0.4 of a run of one, and with `600000` cut off by the edge."""
    steps = lambda last: [
        t for t, (_, y) in labels(loss_svg([(0, 1.0), (last, 2.0)])).items() if y > 360 and t != "step"
    ]
    assert sorted(steps(1)) == ["0", "1"]
    assert steps(600_000) == ["0", "100k", "200k", "300k", "400k", "500k", "600k"]
    assert steps(40_000_000)[-1] == "40M" and steps(5000)[-1] == "5000"
    found = labels(loss_svg([(1, 1e-5)], title="long " * 50))
    assert "training 1.00e-05" in found and max(map(len, found)) == 70


def test_one_point_is_seen():
    """And nothing is said to be nothing. Failed once with a line through one point, which draws nothing."""
    assert (
        '<circle class="lone"' in loss_svg([(1, 2.0)])
        and "lone" not in loss_svg([(1, 2.0), (2, 2.0)]).split("</style>")[1]
    )
    assert "no numbers yet" in loss_svg([]) and "no numbers yet" not in loss_svg([], [(1, 1.0)])


def test_a_long_run_stays_a_small_picture_and_keeps_its_spikes():
    """Failed once at 4.8 MB for 200,000 steps, and once when every n-th point was taken."""
    points = [(i, 2.0) for i in range(200_000)]
    points[123_457] = (123_457, 9.0)
    svg = loss_svg(points)
    drawn = polyline(svg, "train")
    assert len(drawn) <= MOST + 1 and len(svg) < 60_000
    assert min(y for _, y in drawn) < max(y for _, y in drawn) - 200
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert drawn[-1][0] == max(x for x, _ in drawn)


def test_what_is_no_number_is_left_out():
    """Metrics read back have null for NaN. Failed once with a TypeError."""
    svg = loss_svg([(1, 2.0), (2, None), (3, math.nan), (4, 1.0)], [(2, None)], levels={"x": math.nan})
    assert len(polyline(svg, "train")) == 2 and "nan" not in svg and "level" not in svg.split("</style>")[1]
    for nothing in ([], [(1, None)], [(1, math.inf)]):
        ET.fromstring(loss_svg(nothing))
    ET.fromstring(loss_svg([(1, 2.0)]))


def test_sparkline():
    """Low to high, at most as wide as asked. Failed once with an index past the last block."""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, None, math.nan, 1]) == "█▁"
    assert sparkline([2, 2]) == "▁▁" and sparkline([]) == "" and len(sparkline(range(1000), width=40)) == 40
