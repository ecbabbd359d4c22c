"""MI-MAE: pretraining of vision transformers by masking and mutual information.

`import mimae` is fast, because modules that need torch are imported at their first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimae.config.load import RecipeLike
    from mimae.model.mimae import MIMAE
    from mimae.train.trainer import Outcome
    from mimae.transfer.load import load_encoder

__version__ = "0.1.0"
__all__ = ["MIMAE", "__version__", "load_encoder", "pretrain", "run"]

_LAZY = {"MIMAE": "mimae.model.mimae", "load_encoder": "mimae.transfer.load"}


def run(recipe: RecipeLike, *overrides: str, **settings: Any) -> Outcome:
    """Train by a recipe of any task. A run that was interrupted is resumed.

    Args:
        recipe: a path, the name of a shipped recipe, a mapping of sections, or a recipe.
        overrides: `"section.key=value"`, as on the command line.
        settings: scalars or mappings by section, applied last: `masking={"num_masks": 2}, seed=1`.

    Raises:
        mimae.errors.UserError: if there is a mistake in the settings, the data or the run's directory.
    """
    from mimae.config.load import load_recipe
    from mimae.config.recipe import RunRecipe
    from mimae.outside.text import say
    from mimae.outside.threads import yield_cores

    yield_cores(os.environ)  # This has an effect only if torch is not imported yet.
    from mimae.train.tasks.registry import make_task
    from mimae.train.trainer import train

    resolved = load_recipe(recipe, overrides, settings, RunRecipe)
    if os.environ.get("RANK", "0") == "0":
        for note in resolved.notes:
            say(note)
    task = make_task(resolved.recipe)
    task.origins = resolved.origins
    return train(task)


def pretrain(recipe: RecipeLike, *overrides: str, **settings: Any) -> Outcome:
    """Pretrain by a recipe: the same as `run`, but only for recipes of pretraining."""
    from mimae.config.load import load_recipe

    load_recipe(recipe, overrides, settings)  # This raises ConfigError for the recipe of another task.
    return run(recipe, *overrides, **settings)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mimae' has no attribute {name!r}")
