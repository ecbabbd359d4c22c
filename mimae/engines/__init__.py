"""Engines: how a model is spread over ranks and how a step is taken there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mimae.engines.base import Compile, Engine, EngineSettings, check_machine
from mimae.engines.ddp import DDPEngine
from mimae.engines.fsdp import FSDPEngine
from mimae.engines.replicas import DivergenceError
from mimae.engines.zero import ZeroEngine
from mimae.model import outline

if TYPE_CHECKING:
    from mimae.config import Recipe

__all__ = [
    "Compile",
    "DDPEngine",
    "DivergenceError",
    "Engine",
    "EngineSettings",
    "FSDPEngine",
    "ZeroEngine",
    "check_machine",
    "make_engine",
]

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
