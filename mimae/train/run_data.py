"""The data of a run: where they lie, wherever the run is taken up from, and by which rules they are numbered."""

from __future__ import annotations

from pathlib import Path

from mimae.config.kept import load_run, with_version
from mimae.config.recipe import Recipe
from mimae.data.sources.open import absolute_path


def as_kept(recipe: Recipe) -> Recipe:
    """Return the recipe as the run keeps it: with absolute paths of data, and the numbering of its first start."""
    run = Path(recipe.run.dir)
    if (run / "config.yaml").exists():
        recipe = with_version(recipe, load_run(run).data.index_version)
    paths = {
        key: absolute_path(path) for key in ("path", "val_path") if (path := getattr(recipe.data, key)) is not None
    }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=paths)})


def moved_from(recipe: Recipe) -> str | None:
    """Return the data.path that the run was last started with, where it is another one now."""
    run = Path(recipe.run.dir)
    old = load_run(run).data.path if (run / "config.yaml").exists() else recipe.data.path
    return None if absolute_path(old) == recipe.data.path else old
