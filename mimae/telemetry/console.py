"""Output of a run for people: a line per logged step, or a progress bar on a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mimae.outside.text import Output, is_terminal, printable, say


class Console:
    """The lines of a run on stdout, with a progress bar below them if stdout is a terminal."""

    def __init__(self, total_steps: int, losses: Sequence[str], measures: Sequence[str]) -> None:
        self._total_steps, self._losses, self._measures = total_steps, losses, measures[:4]
        # Recent (step, time) pairs. The remaining time is estimated from the last logs, which include checkpoints.
        self._pace: deque[tuple[int, float]] = deque([(0, time.monotonic())], maxlen=50)
        self._progress: Progress | None = None
        if is_terminal():
            self._progress = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=Terminal(file=cast(TextIO, Output())),
                auto_refresh=False,  # It is drawn at each log: a thread could hold a lock when a data loader forks.
            )
            self._task = self._progress.add_task("training", total=total_steps, status="")

    def rewind(self, step: int) -> None:
        """Start to measure the speed at `step`."""
        self._pace.clear()
        self._pace.append((step, time.monotonic()))

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a record of STEP_KEYS."""
        step = int(record["step"])
        self._pace.append((step, time.monotonic()))
        left = self._seconds_left()
        if self._progress is None:
            say(self._step_line(record, left))
        else:
            self._progress.start()
            status = f"{_total(record)}  {_rate(record)}{_wait(record)}  {_clock(left)} left"  # It fits 80 columns.
            self._progress.update(self._task, completed=step, status=status, refresh=True)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Show a record of EPOCH_KEYS."""
        parts = [f"epoch {record['epoch']} done", self._told(record), _rate(record)]
        parts += [f"{key} {record[key]:.3f}" for key in self._measures if record.get(key) is not None]
        if record["mfu"] is not None:
            parts.append(f"MFU {100 * record['mfu']:.1f} %")
        self.message("  ".join(parts))

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._progress is None:
            say(text)
        else:
            self._progress.console.print(printable(text, lines=True), markup=False, highlight=False)

    def close(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.stop()

    def _seconds_left(self) -> float | None:
        (first_step, first), (last_step, last) = self._pace[0], self._pace[-1]
        if last_step <= first_step:
            return None
        return (self._total_steps - last_step) * (last - first) / (last_step - first_step)

    def _told(self, record: Mapping[str, Any]) -> str:
        """Return the loss, and its parts where it has some."""
        found = [f"{key} {record[key]:.3f}" for key in self._losses if key != "loss" and record.get(key) is not None]
        return f"{_total(record)} ({', '.join(found)})" if found else _total(record)

    def _step_line(self, record: Mapping[str, Any], left: float | None) -> str:
        width = len(str(self._total_steps))
        head = f"step {record['step']:>{width}}/{self._total_steps}"
        epoch = "" if record["epoch"] is None else f"  epoch {record['epoch']:.2f}"
        return f"{head}{epoch}  {self._told(record)}  {_rate(record)}{_wait(record)}  eta {_clock(left)}"


def _total(record: Mapping[str, Any]) -> str:
    return "loss not finite" if record["loss"] is None else f"loss {record['loss']:.3f}"


def _rate(record: Mapping[str, Any]) -> str:
    return "" if record["images_per_s"] is None else f"{record['images_per_s']:.0f} images/s"


def _wait(record: Mapping[str, Any]) -> str:
    return "" if record["data_wait"] is None else f"  wait {record['data_wait']:.1%}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
