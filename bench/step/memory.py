"""Peak memory of a training step, measured in a fresh process for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from mimae.bench.machine import resident_bytes
from mimae.bench.step.contenders import OURS, Baseline, Contender, Ours, batch_of
from mimae.bench.step.contest import Contest
from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry
from mimae.model.mimae import MIMAE


def measure_memory(held: Sequence[tuple[Contest, dict[str, Any]]], device: torch.device) -> None:
    """Add `peak_bytes` to every contender, each from a separate process; None if that ran out of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # Free the memory that the contests left in this process.
    for contest, result in held:
        for name, contender in result["contenders"].items():
            contender["peak_bytes"] = None
            with (
                suppress(BrokenProcessPool, torch.OutOfMemoryError),
                ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
            ):
                contender["peak_bytes"] = pool.submit(peak_memory, *contest.contender(name), device).result()


def peak_memory(name: str, recipe: Recipe, device: torch.device) -> int:
    """Bytes that two training steps of a contender add at most to a process that has imported it.

    Meant for a fresh process: on the CPU it is the peak of resident memory.
    """
    _take_steps(name, _miniature(recipe), device)  # This includes imports, and the memory that libraries keep.
    before = resident_bytes("VmRSS")
    _take_steps(name, recipe, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM") - before


def _take_steps(name: str, recipe: Recipe, device: torch.device) -> None:
    """Run the first steps of a contender with random weights."""
    module = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    state, images = module.state_dict(), batch_of(recipe)
    contender: Contender = (
        Ours(recipe, state, images, device) if name == OURS else Baseline(name, recipe, state, images, device)
    )
    del module, state
    contender.warm_up()
    contender.timed(1)


def _miniature(recipe: Recipe) -> Recipe:
    """Return a recipe with the same grid of patches and the same objective, but negligible memory."""
    grid = geometry(recipe).grid
    small = {"width": 8, "depth": 1, "heads": 2}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"image_size": (grid.rows, grid.columns)}),
            "model": recipe.model.model_copy(update={**small, "patch_size": 1}),
            "decoder": recipe.decoder.model_copy(update=small),
            "schedule": recipe.schedule.model_copy(update={"batch_size": 2}),
        }
    )
