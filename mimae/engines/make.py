"""The registry of engines. A new engine is a file with a class, a line here and a name in `EngineSettings.kind`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mimae.config.recipe import RunRecipe
from mimae.engines.base import Engine, M, Obstacles, Setup, Start
from mimae.engines.ddp import DDPEngine
from mimae.engines.fsdp import FSDPEngine
from mimae.engines.zero import Zero1Engine, Zero2Engine, Zero3Engine, restore_linear
from mimae.errors import UserError
from mimae.optim.groups import Rule

ENGINES: dict[str, type[Engine[Any]]] = {
    "ddp": DDPEngine,
    "fsdp": FSDPEngine,
    "zero1": Zero1Engine,
    "zero2": Zero2Engine,
    "zero3": Zero3Engine,
}


def setup_of(recipe: RunRecipe) -> Setup:
    """Return the settings of a recipe that engines need."""
    return Setup(
        engine=recipe.engine,
        optimizer=recipe.optimizer,
        precision=recipe.precision,
        compile=recipe.compile,
        checkpointing=recipe.model.checkpointing,
        ema_decay=recipe.ema.decay,
        batch_size=recipe.schedule.batch_size,
        accumulate=recipe.schedule.accumulate,
        run=Path(recipe.run.dir),
    )


def make_engine(model: M, setup: Setup, device: torch.device, rule: Rule, start: Start) -> Engine[M]:
    """Return the engine that the settings name; see `Engine.__init__`."""
    engine = ENGINES[setup.engine.kind]
    if engine is not Zero3Engine:
        restore_linear()
    return engine(model, setup, device, rule, start)


def check_machine(setup: Setup, device: torch.device, of_model: Obstacles) -> None:
    """Raise UserError if the settings explicitly ask for something that this machine cannot do.

    `of_model` has the model's own obstacles.
    """
    obstacles = ENGINES[setup.engine.kind].obstacles(setup, device) | of_model
    told = [f"{key} cannot run on this {device.type}: {reason}" for key, reason in obstacles.items() if reason]
    if told:
        raise UserError("\n".join([*told, "auto runs everywhere, and so does engine.kind=ddp"]))
