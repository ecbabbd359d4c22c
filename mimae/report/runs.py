"""Reading of a run directory: records, events, pictures, environment and recipe, in any state of its files.

A run may be of unknown origin, from an older version, or in progress. A line that is incomplete or no record is left
out, a value that is not a number is NaN, and a missing or damaged file counts as empty. The only error is a directory
that is not a run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimae.checkpoints import contents
from mimae.config.layers import text
from mimae.config.load import load_recipe
from mimae.config.recipe import RECIPES, RunRecipe, flat
from mimae.errors import CheckpointError, ConfigError, UserError
from mimae.outside.files import Folder
from mimae.telemetry import events, records
from mimae.telemetry.records import number
from mimae.telemetry.telemetry import ORIGINS

Floats = NDArray[np.float64]

_MOST_COLUMNS = 500
"""A task with many classes has a column for each of them."""
_SMALL = 1 << 22
"""Maximal size in bytes of a JSON file that is read here."""

_PICTURE = re.compile(r"step-(\d{1,15})\.png")


class Table:
    """Records as columns of float64, in the order of steps; NaN if a record has no number."""

    def __init__(self, found: Iterable[Mapping[str, Any]]) -> None:
        """Collect the records, each of which has a `step`. If a step has several records, the last one counts."""
        by_step = {record["step"]: record for record in found}
        rows = [by_step[step] for step in sorted(by_step)]
        self._length = len(rows)
        self.keys = list(dict.fromkeys(key for row in (*rows[:1], *rows[-1:]) for key in row))[:_MOST_COLUMNS]
        """The names of the columns: the keys of the first and the last record."""
        self._columns = {key: np.array([number(row.get(key)) for row in rows]) for key in self.keys}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: str) -> Floats:
        """Return a column; a column that does not exist is all NaN."""
        return self._columns.get(key, np.full(len(self), np.nan))

    def has(self, key: str) -> bool:
        """Return True if a column has a finite number."""
        return bool(np.isfinite(self[key]).any())

    def last(self, key: str) -> float:
        """Return the last finite number of a column, or NaN if it has none."""
        found = self[key][np.isfinite(self[key])]
        return float(found[-1]) if len(found) else math.nan


class Value(NamedTuple):
    """A value of the recipe, as text."""

    key: str
    value: str
    default: str
    origin: str = ""
    """Where it was set: a file and line, an override; empty where the run does not tell, or by default."""


class BadSample(NamedTuple):
    path: str
    reason: str


class Picture(NamedTuple):
    step: int
    name: str
    """Path inside the run directory."""


@dataclass(frozen=True)
class Run:
    """The contents of a run's files at one moment. It is not updated if the run is in progress."""

    path: Path
    steps: Table
    """Records of metrics.jsonl."""
    epochs: Table
    """Records of epochs.jsonl."""
    events: list[dict[str, Any]]
    planned: int | None
    """Planned number of steps; None if no checkpoint states it."""
    directions: Mapping[str, str]
    """The best value of each measure: "max" or "min". A run without a checkpoint has those of its task."""
    recipe: RunRecipe | None
    settings: list[Value]
    recipe_fault: str = ""
    """Reason why the recipe could not be read."""
    environment: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    """Contents of init.json: the weights from which the run started."""
    probe: dict[str, Any] = field(default_factory=dict)
    bad_samples: list[BadSample] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @cached_property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)

    def by_epoch(self, key: str) -> tuple[Floats, Floats]:
        """Return the numbers of epochs done, and a column of the epochs' records.

        The epochs in which a measure was not evaluated are left out: they are no gap in its curve.
        """
        done, values = self.epochs["epoch"] + 1, self.epochs[key]
        there = np.isfinite(values) if key in self.directions else np.full(len(values), True)
        return done[there], values[there]

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return int(self.steps["step"][-1]) if len(self.steps) else 0

    @property
    def losses(self) -> list[str]:
        """The task's own columns of metrics.jsonl: losses by term, and gauges."""
        return [key for key in self.steps.keys if key not in _COMMON_STEP]

    @property
    def state(self) -> str:
        """A description of the run's state when it was read."""
        step, last = f"{self.step:,}", self.events[-1] if self.events else {}
        whole = "" if self.planned is None or self.planned <= self.step else f" of {self.planned:,}"
        kind = last.get("kind")
        if kind == "finish":
            return f"finished after {step} steps"
        if kind == "error":
            return f"ended with an error after step {step}{whole}"
        if not len(self.steps):
            return "no step logged yet"
        if kind == "signal" or any(event["kind"] == "signal" for event in self.events[-2:]):
            return f"stopped on a signal after step {step}{whole}"
        return f"at step {step}{whole} when this was read"


_ORIGIN = 200
"""Most characters of an origin that are shown."""

_COMMON_STEP = frozenset(
    {*("step", "epoch", "samples", "lr", "grad_norm", "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes")}
)


def read(path: Path, tail: int | None = None) -> Run:
    """Read a run; with `tail`, read only the last `tail` bytes of its records. Raises UserError if there is no run."""
    try:
        if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
            raise UserError(f"{path} is not the directory of a run: it has neither config.yaml nor metrics.jsonl")
        folder = Folder(path)
        recipe, settings, fault = _recipe(path, _json(folder, ORIGINS))
        planned, directions = _checkpoint(path)
        return Run(
            path=path,
            steps=Table(_records(folder, records.FILES["train"], tail)),
            epochs=Table(_records(folder, records.FILES["epoch"], tail)),
            events=list(events.read(folder)),
            planned=planned,
            directions=directions or dict(recipe.measures if recipe is not None else {}),
            recipe=recipe,
            settings=settings,
            recipe_fault=fault,
            environment=_json(folder, "environment.json"),
            start=_json(folder, "init.json"),
            probe=_json(folder, "probe.json"),
            bad_samples=_bad_samples(folder),
            pictures=_pictures(path),
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def leaves(tree: Mapping[str, Any], prefix: str = "", depth: int = 3) -> list[tuple[str, Any]]:
    """Return the values of nested mappings by dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found += leaves(value, name, depth - 1) if isinstance(value, dict) and depth else [(name, value)]
    return found


def _records(folder: Folder, name: str, tail: int | None) -> Iterator[dict[str, Any]]:
    return records.read(folder, name) if tail is None else records.read(folder, name, tail, tail=True)


def _recipe(path: Path, origins: Mapping[str, Any]) -> tuple[RunRecipe | None, list[Value], str]:
    """Return the recipe of a run of any task, its values, and why it cannot be read."""
    try:
        found = load_recipe(path / "config.yaml", (), None, RunRecipe).recipe
    except ConfigError as error:
        return None, [], str(error)
    defaults = flat(RECIPES[found.task].model_validate({}))

    def origin(key: str) -> str:
        told = str(origins.get(key, "")).rpartition("/")[2][:_ORIGIN]
        return "" if told == "default" else told

    values = [Value(key, text(value), text(defaults.get(key)), origin(key)) for key, value in flat(found).items()]
    return found, values, ""


def _checkpoint(path: Path) -> tuple[int | None, dict[str, str]]:
    """Return the run's planned steps and the directions of its measures, from the newest readable checkpoint."""
    for name in contents.names(path):
        with suppress(CheckpointError, OSError):
            state = contents.read_state(path / "checkpoints" / name)
            better = {str(key): str(way) for key, way in state.get("better", {}).items() if way in ("max", "min")}
            return state.get("steps"), better
    return None, {}


def _json(folder: Folder, name: str) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(folder.read(name, _SMALL))
        if isinstance(found, dict):
            return found
    return {}


def _bad_samples(folder: Folder) -> list[BadSample]:
    found = []
    with suppress(OSError):
        for line in folder.read("bad_samples.jsonl", 1 << 26, tail=True).splitlines():
            with suppress(ValueError, RecursionError):
                sample = json.loads(line)
                if isinstance(sample, dict):
                    found.append(BadSample(str(sample.get("path", "?")), str(sample.get("reason", "?"))))
    return found


def _pictures(path: Path) -> list[Picture]:
    try:
        names = os.listdir(path / "images")
    except OSError:
        return []
    found = ((_PICTURE.fullmatch(name), name) for name in names)
    return sorted(Picture(int(match[1]), f"images/{name}") for match, name in found if match)
