"""The trials of the controls (method 4), with equal views and equal optimizer steps, and those of a tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from mimae.config.load import load_recipe
from mimae.config.recipe import FREE_KEYS, flat
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.evaluate.linear import FOLDS, TOLERANCE
from mimae.evaluate.samples import ranks_in_class
from mimae.optim.schedule import total_steps
from mimae.optim.settings import ScheduleSettings
from mimae.outside.files import write_atomically

RECIPES = {"photos": "quickstart", "cifar": "cifar10"}
"""Recipe of MI-MAE for each data set. The recipes of the other controls add a suffix to its name."""


class Control(NamedTuple):
    """One row of a table."""

    suffix: str
    meaning: str
    seeds: tuple[int, ...]
    stretch: float = 1.0
    """Number of optimizer steps, relative to MI-MAE."""
    overrides: tuple[str, ...] = ()
    """Settings that differ from those of the recipe."""


CONTROLS = {
    "mae": Control("_mae", "2. MAE: one mask, N times the images", (0, 1, 2)),
    "independent": Control("_independent", "3. N independent masks, no MI", (0,)),
    "orthogonal": Control("_orthogonal", "4. N orthogonal masks, no MI", (0, 1, 2)),
    "max_mi": Control("_max_mi", "5. control 4 + L_max", (0,)),
    "mi_mae": Control("", "6. control 5 + L_min: MI-MAE", (0, 1, 2)),
}


CHOICES = {
    "next_view": Control("_next_view", "`decoder.predict=next_view`", (0, 1, 2)),
    "next_view_long": Control("_next_view", "`next_view`, for as long as the default", (0, 1, 2), stretch=1.3),
    "fast": Control("_fast", "next_view, and images that grow: `schedule.resolution`", (0, 1, 2)),
    "cross": Control("_cross", "`decoder.attention=cross`", (0, 1, 2)),
    "cross_long": Control("_cross", "`cross`, for as long as the default", (0, 1, 2), stretch=1.12),
    "heads_64": Control("", "`decoder.heads=1`: heads of 64", (0, 1, 2), overrides=("decoder.heads=1",)),
    "bf16": Control("", "`precision=bf16`", (0, 1, 2), overrides=("precision=bf16",)),
    "residual": Control(
        "", "bf16, `model.residual=bf16`", (0, 1, 2), overrides=("precision=bf16", "model.residual=bf16")
    ),
}
"""Forms of MI-MAE with less work or less precision in a step. A stretch is the time of a step of quickstart over that
of a step of the form (one CPU thread, two rounds of 100 steps: 1.21 and 1.39, 1.08 and 1.15)."""


_PLACES = (*FREE_KEYS, "data.path")
"""Settings on which no result depends, and the paths of the data set, which is identified by its name."""


JUDGE = "probe.tolerance"
"""Key of a result's settings that is not in recipes. Results of the older probe, which stopped early, lack it."""


class Trial(NamedTuple):
    """A run to evaluate. `settings` is its whole recipe by dotted key, without keys on which no result depends."""

    name: str
    data: str
    kind: str
    seed: int
    recipe: str
    overrides: list[str]
    paths: list[str]
    views: int
    settings: dict[str, Any]


Result = dict[str, Any]


def control_trials(data: str) -> list[Trial]:
    """Return the trials of all controls and choices on one data set, seed by seed.

    Raises UserError if controls would see different numbers of views.
    """
    name, paths = parse_data(data)
    recipe = load_recipe(RECIPES[name], paths).recipe
    path = recipe.data.path
    samples = sum(share.draws for share in open_source(path).shares)
    rows = {**CONTROLS, **CHOICES}
    trials = [
        make_trial(
            *(f"{name}-{kind}-{seed}", name, kind, RECIPES[name] + row.suffix),
            *([*stretched(recipe.schedule, samples, row.stretch), *row.overrides], paths, samples, seed),
        )
        for seed in sorted({seed for row in rows.values() for seed in row.seeds})
        for kind, row in rows.items()
        if seed in row.seeds
    ]
    views = {trial.recipe: trial.views for trial in trials if trial.kind in CONTROLS}
    if len(set(views.values())) > 1:
        raise UserError(
            f"the controls on {samples:,} images of {path} would see different numbers of views "
            f"({', '.join(f'{recipe}: {count:,}' for recipe, count in views.items())}); set schedule.max_steps in them"
        )
    return trials


def stretched(schedule: ScheduleSettings, samples: int, stretch: float) -> list[str]:
    """Return the overrides that make a schedule `stretch` times as long; none for 1."""
    if stretch == 1:
        return []
    per_epoch = samples // schedule.batch_size
    steps = round(total_steps(schedule, per_epoch) * stretch)
    return [f"schedule.max_steps={steps}", f"schedule.epochs={-(-steps // per_epoch)}"]


def tuning_trials(file: Path, data: str, folder: Path) -> list[Trial]:
    """Return the trials that `file` lists, on a split of the training set of `data`; its test set is not used.

    The file is YAML: `recipe`, `overrides` of all, and `trials`, each `name: {seeds: [0], overrides: [...]}`.
    """
    name, paths = parse_data(data)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        recipe, shared, listed = content["recipe"], content["overrides"], content["trials"]
        rows = [(kind, list(row["overrides"]), seed) for kind, row in listed.items() for seed in row["seeds"]]
    except OSError as error:
        raise UserError(f"cannot read the list of trials {file}: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is not a list of trials ({error!r}): it holds `recipe`, `overrides` and `trials`, each of them "
            f"`name: {{seeds: [0], overrides: [objective.max_mi=0.1]}}`"
        ) from error
    source = open_source(load_recipe(recipe, paths).recipe.data.path)
    split = hold_out(source, folder.absolute() / f"{name}-split")
    samples = len(open_source(split[0].partition("=")[2]))
    return [
        make_trial(f"{name}-{kind}-{seed}", name, kind, recipe, [*shared, *overrides], split, samples, seed)
        for kind, overrides, seed in rows
    ]


def hold_out(source: Source, folder: Path) -> list[str]:
    """Split a labelled source into list files: four fifths for training and a stratified fifth for evaluation.

    Returns the overrides that name them. The split depends only on the labels.
    """
    if source.labels is None:
        raise UserError(f"{source.name} has no labels: settings cannot be tuned on it")
    held = (ranks_in_class(torch.from_numpy(source.labels), seed=0) % FOLDS == 0).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    overrides = []
    for key, name, part in (("data.path", "train.tsv", False), ("data.val_path", "held.tsv", True)):
        rows = [f"{source.path(i)}\t{source.labels[i]}\n" for i in range(len(source)) if held[i] == part]
        write_atomically(folder / name, "".join(rows))
        overrides.append(f"{key}={folder / name}")
    return overrides


def make_trial(
    name: str, data: str, kind: str, recipe: str, overrides: list[str], paths: list[str], samples: int, seed: int
) -> Trial:
    """Resolve the recipe. The number of steps follows from `samples`, the size of the training set."""
    resolved = load_recipe(recipe, [*overrides, *paths, f"seed={seed}"]).recipe
    batch = resolved.schedule.batch_size
    steps = total_steps(resolved.schedule, samples // batch)
    settings = {key: value for key, value in flat(resolved).items() if key not in _PLACES}
    settings[JUDGE] = TOLERANCE
    views = steps * batch * resolved.masking.num_masks
    return Trial(name, data, kind, seed, recipe, overrides, paths, views, settings)


def parse_data(data: str) -> tuple[str, list[str]]:
    """Return the name and the overrides of the data set `photos` or `cifar=TRAIN:TEST`. Raises UserError."""
    name, _, places = data.partition("=")
    parts = places.split(":") if places else []
    if name not in RECIPES or len(parts) not in (0, 2) or not all(parts):
        raise UserError(f"--data {data}: legal is NAME or NAME=TRAIN:TEST, NAME one of {', '.join(RECIPES)}")
    return name, [f"{key}={place}" for key, place in zip(("data.path", "data.val_path"), parts, strict=False)]
