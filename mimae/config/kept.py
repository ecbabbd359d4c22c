"""The recipe that a run keeps in its directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe

VERSION_KEY = "data.index_version"


def load_run(run: Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe that a run was started with, with overrides. Raises ConfigError.

    A run that names no version of the rules by which files become samples was started with the first.
    """
    found = load_recipe(run / "config.yaml", overrides, settings)
    return found.recipe if found.origins[VERSION_KEY] != "default" else with_version(found.recipe, 1)


def with_version(recipe: Recipe, version: int) -> Recipe:
    """Return the recipe with another version of the rules by which files become samples."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"index_version": version})})
