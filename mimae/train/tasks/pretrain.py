"""Pretraining by MI-MAE."""

from __future__ import annotations

import torch

from mimae.config.recipe import Recipe
from mimae.engines.base import Engine
from mimae.engines.make import make_engine, setup_of
from mimae.model.groups import groups
from mimae.model.mimae import MIMAE, outline
from mimae.randomness import initialise


def engine_of(recipe: Recipe, device: torch.device) -> Engine[MIMAE]:
    """Return the engine of a recipe with the initial weights of its seed."""
    return make_engine(
        outline(recipe),
        setup_of(recipe),
        device,
        groups(recipe.optimizer, recipe.schedule.batch_size, recipe.masking.num_masks),
        start=lambda model, parts: initialise(model, recipe.seed, parts),
    )
