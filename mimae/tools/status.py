"""Where a run stands, from the files of its directory alone: `mimae status RUN`."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from mimae.errors import UserError
from mimae.faults import lock
from mimae.objective.terms import TERMS


def look(run: Path) -> dict[str, str]:
    """What to tell of a run, by heading. Raises UserError where there is none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not the directory of a run: it has no config.yaml")
    last, epoch = _last(run / "metrics.jsonl"), _last(run / "epochs.jsonl")
    saved = (run / "latest").read_text().strip() if (run / "latest").is_file() else None
    told = {"run": str(run), "state": _state(run, last, saved)}
    if last:
        told["step"] = f"{last['step']:,}, {last['epoch']:.2f} epochs, {_ago(run / 'metrics.jsonl')}"
        losses = [
            f"{key} {last[key]:.3f}" for key in ("loss", *(term.name for term in TERMS)) if last.get(key) is not None
        ]
        told["losses"] = ", ".join(losses)
        told["speed"] = f"{last['images_per_s']:,.0f} images/s, {100 * last['data_wait']:.1f} % of it waiting for data"
    if epoch and epoch.get("knn") is not None:
        told["kNN"] = f"{epoch['knn']:.3f} after epoch {epoch['epoch']}"
    told["saved"] = "nothing yet" if saved is None else f"{saved}, {_ago(run / 'latest')}"
    if (run / "bad_samples.jsonl").is_file():
        count = len((run / "bad_samples.jsonl").read_bytes().splitlines())
        told["unreadable"] = f"{count:,}, listed in bad_samples.jsonl"
    return told


def _state(run: Path, last: dict[str, Any] | None, saved: str | None) -> str:
    holder = _holder(run / "lock")
    if holder is not None:
        return f"running, {holder}"
    if saved is None:
        return "not running, nothing saved; the same command begins anew"
    state = json.loads((run / "checkpoints" / saved / "state.json").read_text())
    if state["step"] >= state["steps"]:
        return f"finished after {state['steps']:,} steps"
    lost = last["step"] - state["step"] if last else 0
    again = f", and repeats the {lost:,} after it" if lost > 0 else ""
    return f"not running; the same command goes on from step {state['step']:,} of {state['steps']:,}{again}"


def _holder(file: Path) -> str | None:
    """The process that holds the run, as it wrote itself down; None where nobody does. For another host's this waits
    some seconds, for a sign of life."""
    if not file.is_file():
        return None
    owner = lock.read(file)
    with file.open("r") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return str(owner or "?")
    return str(owner) if owner is not None and owner.is_elsewhere and lock.moves(file) else None


def _last(file: Path) -> dict[str, Any] | None:
    """The last whole record of a .jsonl file."""
    if not file.is_file():
        return None
    for line in reversed(file.read_bytes().splitlines()):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue  # torn by a crash
    return None


def _ago(file: Path) -> str:
    seconds = max(0.0, time.time() - file.stat().st_mtime)
    for name, unit in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} seconds ago"
