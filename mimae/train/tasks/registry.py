"""The registry of tasks. A new task is a file with a class in this folder, a line in `TASKS`, and a class of recipe in
`config.recipe.RECIPES`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mimae.config.recipe import RunRecipe
from mimae.train.task import Task

TASKS = {
    "pretrain": ("pretrain", "Pretrain"),
    "classify": ("classify", "Classify"),
    "segment": ("segment", "Segment"),
    "detect": ("detect", "Detect"),
}
"""Module in this folder and class of each task, by the `task` of its recipe. A task is imported when it runs."""


def make_task(recipe: RunRecipe) -> Task[Any]:
    """Return the task of a recipe."""
    module, name = TASKS[recipe.task]
    made: Task[Any] = getattr(import_module(f"mimae.train.tasks.{module}"), name)(recipe)
    return made
