"""A live view of a run in a terminal, from its files: state, remaining time, small curves, last events."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mimae.outside.output import as_json
from mimae.outside.progress import clock
from mimae.outside.text import is_terminal, printable, say
from mimae.report import runs
from mimae.report.curves import thinned
from mimae.report.findings import findings
from mimae.report.runs import Floats, Run
from mimae.tools import status

TAIL = 1 << 20
"""Number of bytes of metrics.jsonl that are read: some thousand records."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_EVENTS = 4


def watch(path: Path, every: float) -> None:
    """Show a run until it is finished or the user presses Ctrl-C; if stdout is not a terminal, show it once.

    Raises UserError if there is no run.
    """
    lines, is_done = view(path)
    if as_json(_document(lines, is_done)):
        while not is_done:
            time.sleep(every)
            lines, is_done = view(path)
            as_json(_document(lines, is_done))
        return
    if not is_terminal():
        say("\n".join(lines))
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def shown() -> Text:
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    try:
        with Live(shown(), console=Console(highlight=False), auto_refresh=False) as live:
            while not is_done:
                time.sleep(every)
                lines, is_done = view(path)
                live.update(shown(), refresh=True)
    except KeyboardInterrupt:
        pass


def _document(lines: list[str], is_done: bool) -> dict[str, object]:
    """Return a look for --json."""
    return {"is_finished": is_done, "lines": lines}


def view(path: Path) -> tuple[list[str], bool]:
    """Return the lines of the view, and True if the run is finished. Raises UserError if there is no run."""
    state = status.look(path)["state"]
    run = runs.read(path, tail=TAIL)
    lines = [f"{printable(path)}: {state}", *_progress(run), *_curves(run)]
    if len(run.epochs):
        checks = [f"{key} {run.epochs.last(key):.4g}" for key in run.directions if run.epochs.has(key)]
        lines.append(f"epoch {run.epochs.last('epoch') + 1:g} done  {', '.join(checks)}".rstrip())
    lines += [f"! {finding.text}" for finding in findings(run) if finding.weight != "good"]
    for event in [event for event in run.events if event["kind"] != "save"][-_EVENTS:]:
        details = ", ".join(f"{key} {value}" for key, value in event["details"].items() if value is not None)
        lines.append(printable(f"{str(event.get('time', ''))[11:19]}  {event['kind']}  {details}")[:200].rstrip())
    return lines, bool(run.events) and run.events[-1]["kind"] == "finish"


def sparkline(values: Floats, width: int = _WIDTH) -> str:
    """Return a curve of block characters with the newest value at the right; a blank stands for a missing number."""
    y = thinned(np.arange(len(values), dtype=float), values, width).y
    finite = y[np.isfinite(y)]
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    scaled = (y - low) / (high - low) * (len(_BLOCKS) - 1) if high > low else np.where(np.isfinite(y), 0.0, y)
    return "".join(" " if math.isnan(each) else _BLOCKS[round(each)] for each in scaled.tolist())


def _progress(run: Run) -> Iterator[str]:
    """Yield the line with the number of steps done and the remaining time."""
    if not len(run.steps):
        return
    planned = run.planned or _planned(run)
    if not planned:
        yield f"step {run.step:,}"
        return
    done = min(run.step / planned, 1.0)
    bar = "█" * round(done * _WIDTH)
    rates = run.steps["images_per_s"][-50:]
    rates = rates[rates > 0]
    left = ""
    if len(rates) and 0 < run.step < planned:
        batch = run.steps.last("samples") / run.step
        seconds = (planned - run.step) * batch / float(np.median(rates))
        left = f", {clock(seconds)} left" if math.isfinite(seconds) else ""
    yield f"step {run.step:,} of {planned:,}  {bar:·<{_WIDTH}}  {done:.0%}{left}"


def _planned(run: Run) -> int | None:
    """Return the planned number of steps by the recipe, for a run without checkpoints."""
    if run.recipe is None:
        return None
    schedule, epochs = run.recipe.schedule, run.steps.last("epoch")
    if schedule.max_steps is not None:
        return schedule.max_steps
    return round(schedule.epochs * run.step / epochs) if epochs > 0 else None


def _curves(run: Run) -> Iterator[str]:
    keys = [key for key in run.losses if run.steps.has(key)]
    rows = [(key, f"{run.steps.last(key):.4g}", run.steps[key]) for key in keys]
    if run.steps.has("images_per_s"):
        rows.append(("images/s", f"{run.steps.last('images_per_s'):,.0f}", run.steps["images_per_s"]))
    if run.steps.has("data_wait"):
        rows.append(("waiting for data", f"{run.steps.last('data_wait'):.1%}", run.steps["data_wait"]))
    if run.steps.has("mem_peak_bytes"):
        memory = run.steps["mem_peak_bytes"] / 2**20
        rows.append(("memory, MiB", f"{memory[np.isfinite(memory)][-1]:,.0f}", memory))
    width = max((len(printable(name)) for name, _, _ in rows), default=0)
    for name, value, values in rows:
        yield f"  {printable(name):<{width}}  {value:>9}  {sparkline(values)}"
