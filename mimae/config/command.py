"""The arguments of `mimae config` and `mimae settings`, and those that every verb with a recipe takes."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(help="path or name of a recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides: masking.ratio=0.6")]


def config(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print what a recipe resolves to, and the origin of each value."""
    from mimae.config.load import load_recipe
    from mimae.config.printing import explain
    from mimae.config.recipe import RunRecipe

    print(explain(load_recipe(recipe, overrides or (), None, RunRecipe)), end="")


def settings() -> None:
    """Print the reference of all settings (Markdown)."""
    from mimae.config.printing import reference

    print(reference(), end="")
