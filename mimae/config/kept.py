"""The recipe that a run keeps in its directory, as config.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from mimae.config.load import load_recipe
from mimae.config.recipe import FREE_KEYS, R, Recipe, RunRecipe

VERSION_KEY = "data.index_version"


@overload
def load_run(run: Path, overrides: Sequence[str] = ..., settings: Mapping[str, Any] | None = ...) -> Recipe: ...


@overload
def load_run(run: Path, overrides: Sequence[str], settings: Mapping[str, Any] | None, kind: type[R]) -> R: ...


def load_run(
    run: Path,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    kind: type[RunRecipe] = Recipe,
) -> Any:
    """Return the recipe with which a run was started, with overrides applied.

    If the recipe has no version of the rules that number samples, the version is 1. Raises ConfigError, also if the
    recipe is not of `kind` (see `load_recipe`).
    """
    found = load_recipe(run / "config.yaml", overrides, settings, kind)
    return found.recipe if found.origins[VERSION_KEY] != "default" else with_version(found.recipe, 1)


def newer_keys(run: Path) -> list[str]:
    """Return the fixed keys that a run's config.yaml lacks because they are newer than the run.

    The default of a new key is the behaviour of all runs before the key existed, so the run continues with it, and its
    config.yaml stays without the key. The version of the rules that number samples is an exception, see `load_run`.
    """
    origins = load_recipe(run / "config.yaml", (), None, RunRecipe).origins
    return [key for key, origin in origins.items() if origin == "default" and key not in (*FREE_KEYS, VERSION_KEY)]


def with_keys_of(recipe: R, other: R, keys: Sequence[str]) -> R:
    """Return the recipe with the values of `other` for the dotted keys `keys`."""
    for section, _, name in (key.rpartition(".") for key in keys):
        value = {name: getattr(getattr(other, section) if section else other, name)}
        recipe = recipe.model_copy(
            update={section: getattr(recipe, section).model_copy(update=value)} if section else value
        )
    return recipe


def with_version(recipe: R, version: int) -> R:
    """Return the recipe with another version of the rules that number samples."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"index_version": version})})
