"""The engine that a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mimae.engines.base import Engine
from mimae.engines.ddp import DDPEngine
from mimae.engines.fsdp import FSDPEngine
from mimae.engines.zero import ZeroEngine
from mimae.model.mimae import outline

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

_ENGINES: dict[str, type[Engine]] = {
    "ddp": DDPEngine,
    "fsdp": FSDPEngine,
    "zero1": ZeroEngine,
    "zero2": ZeroEngine,
    "zero3": ZeroEngine,
}


def make_engine(recipe: Recipe, device: torch.device, views: int) -> Engine:
    """The engine of a recipe with the initial weights of its seed; `views`: images x masks of the global batch."""
    return _ENGINES[recipe.engine.kind](outline(recipe), recipe, device, views)
