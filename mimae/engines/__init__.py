"""Engines: how a model is spread over ranks and how a step is taken there."""

from mimae.engines.base import Engine, EngineSettings
from mimae.engines.ddp import DDPEngine

__all__ = ["DDPEngine", "Engine", "EngineSettings"]
