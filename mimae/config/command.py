"""The commands `mimae config` and `mimae settings`, and the arguments of every command that takes a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(help="path or name of a recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides: masking.ratio=0.6")]


def config(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print all settings of a recipe, and the origin of each value."""
    from mimae.config.load import load_recipe
    from mimae.config.printing import explain
    from mimae.config.recipe import RunRecipe
    from mimae.outside.output import as_json
    from mimae.outside.text import say

    resolved = load_recipe(recipe, overrides or (), None, RunRecipe)
    if not as_json({"recipe": resolved.recipe.model_dump(mode="json"), "origins": resolved.origins}):
        say(explain(resolved).removesuffix("\n"))


def settings() -> None:
    """Print the reference of all settings (Markdown)."""
    from mimae.config.printing import reference, rows
    from mimae.outside.output import as_json
    from mimae.outside.text import say

    if not as_json(list(rows())):
        say(reference().removesuffix("\n"))
