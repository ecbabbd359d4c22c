"""Values that a resumed run keeps from its start: the paths of its data, the rules that number its samples, and the
defaults of keys that are newer than the run."""

from __future__ import annotations

import os
from pathlib import Path

from mimae.config.kept import load_run, newer_keys, with_keys_of, with_version
from mimae.config.layers import text
from mimae.config.recipe import R, RunRecipe, flat
from mimae.data.sources.open import absolute_path


def as_kept(recipe: R) -> R:
    """Return the recipe as the run keeps it.

    Paths of data are absolute. For an existing run the numbering of samples is that of its first start, extensions of
    the schedule are kept, and keys that are newer than the run have their defaults. A new run has no extensions, also
    if its recipe is the config.yaml of a run that was extended: it has the whole new length from its first step.
    """
    run = Path(recipe.run.dir)
    extended: tuple[tuple[int, float, str], ...] = ()
    if (run / "config.yaml").exists():
        old = load_run(run, (), None, type(recipe))
        recipe = with_version(with_keys_of(recipe, old, newer_keys(run)), old.data.index_version)
        extended = old.schedule.extended
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"extended": extended})})
    paths = {
        key: absolute_path(path) for key in ("path", "val_path") if (path := getattr(recipe.data, key)) is not None
    }
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=paths)})
    for section, _, name in (key.partition(".") for key in recipe.labels):
        settings = getattr(recipe, section)
        if (path := getattr(settings, name)) is not None:
            absolute = os.path.abspath(os.path.expanduser(path))
            recipe = recipe.model_copy(update={section: settings.model_copy(update={name: absolute})})
    return recipe


def not_taken_up(asked: RunRecipe, recipe: RunRecipe) -> str | None:
    """Return a message about requested settings that are newer than the run and not applied, or None if there are none.

    `asked` is the recipe that was requested, `recipe` the one with which the run continues.
    """
    run, wanted, used = Path(recipe.run.dir), flat(asked), flat(recipe)
    newer = newer_keys(run) if (run / "config.yaml").exists() else []
    others = [f"{key}={text(used[key])} (not {text(wanted[key])})" for key in newer if wanted[key] != used[key]]
    if not others:
        return None
    return (
        f"{run} is older than some keys of its recipe and continues as it was started, with {', '.join(others)}; "
        "another run.dir begins a new run"
    )


def changed(asked: RunRecipe, recipe: RunRecipe) -> dict[str, str]:
    """Return the origin of each value that the run chose in place of the one that was asked for."""
    wanted, used = flat(asked), flat(recipe)
    return {key: f"chosen for {text(wanted[key])}" for key in used if used[key] != wanted[key]}


def moved_from(recipe: RunRecipe) -> str | None:
    """Return the data.path of the run's last start if it differs from the present one, else None."""
    run = Path(recipe.run.dir)
    old = load_run(run, (), None, RunRecipe).data.path if (run / "config.yaml").exists() else recipe.data.path
    return None if absolute_path(old) == recipe.data.path else old
