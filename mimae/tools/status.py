"""State of a run, from the files of its directory only: `mimae status RUN`."""

from __future__ import annotations

import fcntl
import math
import os
import time
from pathlib import Path
from typing import Any

from mimae.checkpoints import contents
from mimae.config.recipe import RECIPES, Recipe
from mimae.errors import CheckpointError, UserError
from mimae.faults import lock
from mimae.objective.terms import TERMS
from mimae.outside.files import Folder
from mimae.outside.text import printable
from mimae.telemetry import events, records

_BLOCK, _COUNTED = 1 << 20, 1 << 26
"""Bytes of a file whose lines are counted: at once, and at most."""

_MEASURES = tuple(dict.fromkeys(key for tree in RECIPES.values() if tree is not Recipe for key in tree.measures))
"""Measures of the tasks other than pretraining."""


def look(run: Path) -> dict[str, str]:
    """Return the report on a run by heading, whatever state its files are in. Raises UserError if there is no run."""
    try:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is not a run directory: it has no config.yaml")
        return {heading: printable(told) for heading, told in _look(run, Folder(run)).items()}
    except OSError as error:
        raise UserError(f"{run} cannot be read: {error.strerror}") from error


def _look(run: Path, folder: Folder) -> dict[str, str]:
    last, epoch = _last(folder, "metrics.jsonl"), _last(folder, "epochs.jsonl")
    told = {"run": str(run), "state": _state(run, last)}
    if last:
        epochs = _number(last, "epoch")
        parts = [f"{last['step']:,}", "" if epochs is None else f"{epochs:.2f} epochs", _ago(run / "metrics.jsonl")]
        size = _number(last, "image_size")
        if size is not None and any(event["kind"] == "resolution" for event in events.read(folder)):
            parts.insert(-1, f"images of {size:.0f} px")
        told["step"] = ", ".join(filter(None, parts))
        found = {key: _number(last, key) for key in ("loss", *(term.name for term in TERMS))}
        losses = [f"{key} {value:.3f}" for key, value in found.items() if value is not None]
        told["losses"] = ", ".join(losses) or "not finite"
        rate, wait = _number(last, "images_per_s"), _number(last, "data_wait")
        if rate is not None:
            told["speed"] = f"{rate:,.0f} images/s"
            told["speed"] += "" if wait is None else f", {100 * wait:.1f} % of the time waiting for data"
    if epoch and (knn := _number(epoch, "knn")) is not None:
        told["kNN"] = f"{knn:.3f} after epoch {epoch.get('epoch')}"
    if epoch and (found := {key: value for key in _MEASURES if (value := _number(epoch, key)) is not None}):
        measured = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        told["measured"] = f"{measured} after epoch {epoch.get('epoch')}"
    told["saved"] = _saved(run)
    if (count := _count(folder, "bad_samples.jsonl")) is not None:
        told["unreadable"] = f"{count}, listed in bad_samples.jsonl"
    return told


def _state(run: Path, last: dict[str, Any] | None) -> str:
    holder = _holder(run / "lock")
    if holder is not None:
        return f"running, {holder}"
    found = contents.names(run)
    if not found:
        return "not running, nothing saved; the same command starts from the beginning"
    broken = ""
    for name in found:
        try:
            state = contents.read_state(run / "checkpoints" / name)
        except (CheckpointError, OSError) as error:
            broken = broken or f"; the newest checkpoint, {name}, cannot be used: {error}"
            continue
        step, steps = state["step"], state.get("steps", 0)
        if step >= steps:
            return f"finished after {steps:,} steps{broken}"
        lost = last["step"] - step if last else 0
        again = f", and repeats the {lost:,} after it" if lost > 0 else ""
        return f"not running; the same command resumes from step {step:,} of {steps:,}{again}{broken}"
    return f"not running; none of the {len(found)} checkpoints can be used{broken}"


def _saved(run: Path) -> str:
    """Return a text that names the newest checkpoint, and a fault of `latest`."""
    found, latest = contents.names(run), contents.read_latest(run)
    if not found:
        return "nothing yet" if latest is None else f"nothing: latest names {latest}, which does not exist"
    newest = run / "checkpoints" / found[0]
    told = f"{found[0]}, {_ago(newest)}"
    if latest is None:
        return f"{told}; the file latest is missing or empty, and is not needed"
    return told if latest in found else f"{told}; latest names {latest}, which does not exist"


def _holder(file: Path) -> str | None:
    """Return the process that owns the run, as it is named in the lock file, or None if there is none.

    For a process of another host this waits some seconds for a sign of life.
    """
    owner = lock.read(file)
    try:
        opened = Folder(file.parent).open(file.name, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return str(owner or "?")
    finally:
        os.close(opened)
    return str(owner) if owner is not None and owner.is_elsewhere and lock.moves(file) else None


def _last(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the last complete record of a file."""
    return next(reversed([*records.read(folder, name, 1 << 18, tail=True)]), None)


def _number(record: dict[str, Any], key: str) -> float | None:
    value = records.number(record.get(key))
    return None if math.isnan(value) else value


def _count(folder: Folder, name: str) -> str | None:
    """Return the number of lines of a file, of which at most _COUNTED bytes are read; None if it cannot be read."""
    lines = size = 0
    try:
        with os.fdopen(folder.open(name, os.O_RDONLY), "rb") as file:
            while size < _COUNTED and (block := file.read(_BLOCK)):
                lines, size = lines + block.count(b"\n"), size + len(block)
            return f"{'more than ' if file.read(1) else ''}{lines:,}"
    except OSError:
        return None


def _ago(file: Path) -> str:
    try:
        seconds = max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return "gone by now"
    for name, unit in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} seconds ago"
