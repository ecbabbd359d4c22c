"""Engines: how a model is spread over ranks and how a step is taken there."""

from mimae.engines.base import Compile, Engine, EngineSettings, check_machine
from mimae.engines.ddp import DDPEngine

__all__ = ["Compile", "DDPEngine", "Engine", "EngineSettings", "check_machine"]
