"""Tests of the progress display, which is the same in all commands, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from mimae.outside import output, progress
from mimae.outside.progress import Progress, clock, track


class Terminal(io.StringIO):
    """A stream that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list with the clock's time in seconds as its only entry, which a test can change."""
    seconds = [100.0]
    monkeypatch.setattr(progress, "FIRST", 2.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def work(now: list[float], seconds: float, items: int = 10) -> None:
    for _ in track(range(items), "checking", items, "images"):
        now[0] += seconds


def test_elsewhere_there_is_a_line_now_and_then_on_stderr(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work(now, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "checking: 1 of 10 images (10%)  0:27 left",
        "checking: 5 of 10 images (50%)  0:15 left",
        "checking: 9 of 10 images (90%)  0:03 left",
        "checking: 10 of 10 images (100%)  0:30",
    ]


def test_short_work_and_quiet_commands_show_nothing(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work(now, 0.19)
    with output.mode(quiet=True, machine=False):
        work(now, 60)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_with_the_time_left(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("embedding\x1b[31m", 40, "images", done=20) as shown:
        now[0] += 2
        shown.add(10, "part 2")
        shown.message("3 of 40 cannot be read")
    drawn = terminal.getvalue()
    assert "embedding\\x1b[31m" in drawn and "\x1b[31m" not in drawn
    assert "30/40" in drawn and "5 images/s  0:02 left  part 2" in drawn and "3 of 40 cannot be read" in drawn
    assert capsys.readouterr().out == ""


def test_parts_of_a_work_are_named_as_they_begin(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("exporting", 3) as shown:
        for part in ("weights", "check.py", "comparison"):
            shown.begin(part)
            now[0] += 12
    assert capsys.readouterr().err.splitlines() == [
        "exporting: 1 of 3 (33%)  0:24 left  check.py",
        "exporting: 2 of 3 (67%)  0:12 left  comparison",
    ]


@pytest.mark.parametrize(("seconds", "told"), [(None, "-:--"), (42, "0:42"), (723, "12:03"), (11220, "3:07:00")])
def test_durations(seconds: float | None, told: str) -> None:
    assert clock(seconds) == told
