"""Fine-tuning from several starts by the same recipe, with several seeds each: a table of the final measures."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimae.bench.machine import describe
from mimae.config.load import load_recipe
from mimae.config.recipe import RECIPES, RunRecipe
from mimae.config.texts import text_keys
from mimae.errors import UserError
from mimae.train.tasks.registry import make_task
from mimae.train.trainer import train

TITLES = {"top1": "top-1", "top5": "top-5", "val_loss": "loss", "miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
"""Titles of measures in a table."""


class Stopped(Exception):
    """A run saved on a signal."""


class Start(NamedTuple):
    """A row of the table."""

    name: str
    overrides: list[str]

    @classmethod
    def of(cls, text: str) -> Start:
        """Read `NAME: KEY=VALUE ...`. Raises UserError."""
        name, colon, rest = text.partition(":")
        if not (name.strip() and colon):
            raise UserError(f"--start {text}: legal is NAME: KEY=VALUE ..., as MAE: model.init=runs/mae")
        return cls(name.strip(), shlex.split(rest))


def compare(recipe: str, overrides: Sequence[str], starts: Sequence[Start], seeds: int, folder: Path) -> dict[str, Any]:
    """Train from each start with the seeds 0, 1, ..., and return the content of a result file, without paths.

    Finished runs in `folder` are not trained again. Raises Stopped, and UserError for unusable settings.
    """
    found: dict[str, list[dict[str, Any]]] = {start.name: [] for start in starts}
    for seed in range(seeds):
        for i, start in enumerate(starts):
            run = folder / f"start-{i}-seed-{seed}"
            given = [*overrides, *start.overrides, f"seed={seed}", f"run.dir={run}", "telemetry.trackers=[]"]
            resolved = load_recipe(recipe, given, None, RunRecipe).recipe
            if not resolved.measures or resolved.data.val_path is None:
                raise UserError(f"{recipe} measures nothing: a fine-tuned task with data.val_path is needed")
            if not train(make_task(resolved)).finished:
                raise Stopped
            last = json.loads((run / "epochs.jsonl").read_text().splitlines()[-1])
            found[start.name].append(
                {"seed": seed, "step": last["step"], **{key: last[key] for key in resolved.measures}}
            )
    settings = {"overrides": list(_shown(overrides)), "of_starts": {s.name: list(_shown(s.overrides)) for s in starts}}
    return {
        "bench": "starts",
        **describe(torch.device("cpu")),
        "recipe": Path(recipe).stem,
        **settings,
        "starts": found,
    }


def _shown(overrides: Sequence[str]) -> Iterator[str]:
    """Yield the overrides that are no paths of this machine."""
    paths = text_keys(*RECIPES.values()).paths | {"model.init"}
    return (each for each in overrides if each.partition("=")[0] not in paths)


def table(found: Mapping[str, Any]) -> str:
    """Return the table of a result file: mean and standard deviation over the seeds."""
    rows = [row for of_start in found["starts"].values() for row in of_start]
    names = [name for name in rows[0] if name not in ("seed", "step") and all(row[name] is not None for row in rows)]
    lines = [f"| start | {' | '.join(TITLES.get(name, name) for name in names)} |", "|---" * (1 + len(names)) + "|"]
    for start, runs in found["starts"].items():
        cells = [_spread([run[name] for run in runs]) for name in names]
        lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"
