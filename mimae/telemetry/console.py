"""Output of a run for people: a line per logged step, or a progress bar on a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mimae.outside.output import is_quiet
from mimae.outside.progress import Bar, clock
from mimae.outside.text import is_terminal, say


class Console:
    """The lines of a run on stdout, with a progress bar below them if stdout is a terminal; none with --quiet."""

    def __init__(
        self,
        total_steps: int,
        losses: Sequence[str],
        measures: Sequence[str],
        work: Callable[[int], float] = float,
    ) -> None:
        """`work` returns the work of the first steps of the run, in any unit; by default each step is as much work."""
        self._total_steps, self._losses, self._measures = total_steps, losses, measures[:4]
        self._work = work
        # Recent (work, time) pairs. The remaining time is estimated from the last logs, which include checkpoints.
        self._pace: deque[tuple[float, float]] = deque([(0.0, time.monotonic())], maxlen=50)
        self._is_quiet = is_quiet()
        self._bar = Bar(total_steps, stream="stdout") if is_terminal() and not self._is_quiet else None

    def begin(self, step: int) -> None:
        """Start to measure the speed at `step`."""
        self._pace.clear()
        self._pace.append((self._work(step), time.monotonic()))

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a record of STEP_KEYS."""
        step = int(record["step"])
        self._pace.append((self._work(step), time.monotonic()))
        left = self._seconds_left()
        if self._bar is not None:
            status = f"{_total(record)}  {_rate(record)}{_wait(record)}  {clock(left)} left"  # It fits 80 columns.
            self._bar.draw(step, status)
        elif not self._is_quiet:
            say(self._step_line(record, left))

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Show a record of EPOCH_KEYS."""
        parts = [f"epoch {record['epoch']} done", self._told(record), _rate(record)]
        parts += [f"{key} {record[key]:.3f}" for key in self._measures if record.get(key) is not None]
        if record["mfu"] is not None:
            parts.append(f"MFU {100 * record['mfu']:.1f} %")
        self.message("  ".join(parts))

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.message(text)
        elif not self._is_quiet:
            say(text)

    def close(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self) -> float | None:
        (before, first), (done, last) = self._pace[0], self._pace[-1]
        if done <= before:
            return None
        return (self._work(self._total_steps) - done) * (last - first) / (done - before)

    def _told(self, record: Mapping[str, Any]) -> str:
        """Return the loss, and its parts where it has some."""
        found = [f"{key} {record[key]:.3f}" for key in self._losses if key != "loss" and record.get(key) is not None]
        return f"{_total(record)} ({', '.join(found)})" if found else _total(record)

    def _step_line(self, record: Mapping[str, Any], left: float | None) -> str:
        width = len(str(self._total_steps))
        head = f"step {record['step']:>{width}}/{self._total_steps}"
        epoch = "" if record["epoch"] is None else f"  epoch {record['epoch']:.2f}"
        return f"{head}{epoch}  {self._told(record)}  {_rate(record)}{_wait(record)}  eta {clock(left)}"


def _total(record: Mapping[str, Any]) -> str:
    return "loss not finite" if record["loss"] is None else f"loss {record['loss']:.3f}"


def _rate(record: Mapping[str, Any]) -> str:
    return "" if record["images_per_s"] is None else f"{record['images_per_s']:.0f} images/s"


def _wait(record: Mapping[str, Any]) -> str:
    return "" if record["data_wait"] is None else f"  wait {record['data_wait']:.1%}"
