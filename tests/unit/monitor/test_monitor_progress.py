"""Progress goes to stderr or nowhere."""

import io
import sys

from shardtrain.monitor import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress) -> None:
    with progress:
        progress.say("held out")
        for step in (1, 2, 3):
            progress.update(step, 4 / step, 1234.5, 0.25, 61.0)


def test_silent_when_asked(capfd, monkeypatch):
    """Also on a terminal. Failed once when `say` did not ask."""
    run(Progress(3, enabled=False))
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(Progress(3, enabled=False))
    assert sys.stderr.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_plain_lines_where_there_is_no_terminal(capfd):
    """The first and the last step, the rest by the clock; nothing on stdout. Failed once with a line a step."""
    run(Progress(3, every=1e6))
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "held out",
        "step 1/3  loss 4.0000  1,234 tokens/s  MFU 25.0%  1:01 left",
        "step 3/3  loss 1.3333  1,234 tokens/s  MFU 25.0%",
    ]


def test_unknown_is_not_shown(capfd):
    """Failed once with `MFU None`."""
    with Progress(9) as progress:
        progress.update(1, 2.0, None, None)
    assert capfd.readouterr().err == "step 1/9  loss 2.0000\n"


def test_a_bar_on_a_terminal(capfd, monkeypatch):
    """Failed once when rich drew on stdout."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    run(Progress(3))
    shown = sys.stderr.getvalue()
    assert "step 3/3" in shown and "loss 1.3333  1,234 tokens/s  MFU 25.0%" in shown and "held out" in shown
    assert capfd.readouterr().out == ""
