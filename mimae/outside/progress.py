"""How far a command is: a bar with the time left on a terminal, and elsewhere a plain line now and then.

All commands look the same. Nothing is shown with --quiet, and no line where the work takes less than two seconds. It
goes to stderr, so that stdout holds results only; the lines of a training run are its results, so `Bar` may also draw
on stdout.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

from mimae.outside.output import is_quiet
from mimae.outside.text import Stream, as_file, is_terminal, printable, say

T = TypeVar("T")

FIRST, BETWEEN = 2.0, 10.0
"""Seconds until the first line where there is no terminal, and between two lines."""

_FRAME = 0.1
"""Least seconds between two drawings of a bar."""


def clock(seconds: float | None) -> str:
    """Return a duration as 0:42, 12:03 or 3:07:00."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bar:
    """A bar on a terminal: title, share done, count, and a text that the caller gives."""

    def __init__(self, total: int, title: str = "", stream: Stream = "stderr") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            *([TextColumn("{task.description}", markup=False)] if title else []),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(file=as_file(stream)),
            auto_refresh=False,  # A thread that draws could hold a lock when a data loader forks.
            transient=bool(title),
        )
        self._task = self._progress.add_task(printable(title), total=total, status="")

    def draw(self, done: int, status: str) -> None:
        """Draw the bar."""
        self._progress.start()
        self._progress.update(self._task, completed=done, status=printable(status), refresh=True)

    def message(self, text: str) -> None:
        """Print lines above the bar."""
        self._progress.console.print(printable(text, lines=True), markup=False, highlight=False)

    def close(self) -> None:
        """End the bar. One with a title disappears."""
        self._progress.stop()


class Progress:
    """The progress of a command over `total` items, `done` of which were done before.

    `unit` names the items; the rate is shown where it is a plural, as images. As a context it ends its bar.
    """

    def __init__(self, title: str, total: int, unit: str = "", done: int = 0) -> None:
        self.title, self.total, self.unit, self.before, self.done = title, total, unit, done, done
        self._began = self._drawn = time.monotonic()
        self._said: float | None = None
        self._has_begun = False
        self._is_quiet = is_quiet()
        self._bar: Bar | None = None
        if is_terminal("stderr") and not self._is_quiet:
            self._bar = Bar(total, title)
            self._bar.draw(done, "")

    def add(self, count: int = 1, note: str = "") -> None:
        """Count items as done. `note` is a word on the present one."""
        self.done += count
        if self._is_quiet:
            return
        now = time.monotonic()
        if self._bar is not None:
            if now - self._drawn >= _FRAME or note or self.done >= self.total:
                self._drawn = now
                self._bar.draw(self.done, self._status(now, note))
            return
        is_due = now - self._began >= FIRST if self._said is None else now - self._said >= BETWEEN
        if is_due or (self._said is not None and self.done >= self.total):
            self._said = now
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            count_of = f"{self.done:,} of {self.total:,} {self.unit}".rstrip()
            say(f"{self.title}: {count_of}{share}  {self._status(now, note)}".rstrip(), error=True)

    def begin(self, note: str) -> None:
        """Count the previous item as done, and name the one that begins now."""
        self.add(int(self._has_begun), note)
        self._has_begun = True

    def message(self, text: str) -> None:
        """Print lines on stderr, above the bar if there is one."""
        if self._bar is None:
            say(text, error=True)
        else:
            self._bar.message(text)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _status(self, now: float, note: str) -> str:
        """Return rate, time left and note."""
        rate = (self.done - self.before) / max(now - self._began, 1e-9)
        left = clock((self.total - self.done) / rate) if rate else clock(None)
        parts = [f"{rate:,.0f} {self.unit}/s" if self.unit and rate >= 2 else ""]
        parts += [f"{left} left" if self.done < self.total else clock(now - self._began), note]
        return "  ".join(filter(None, parts))


def track(items: Iterable[T], title: str, total: int, unit: str = "") -> Iterator[T]:
    """Yield items, and show how many of `total` the caller has taken and worked on."""
    with Progress(title, total, unit) as progress:
        for item in items:
            yield item
            progress.add()
