"""Memory of a training step: its peak in a fresh process for each contender, and its tensors, counted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from mimae.bench.machine import resident_bytes
from mimae.bench.step.contenders import OURS, Baseline, Contender, Ours, batch_of
from mimae.bench.step.contest import Contest
from mimae.bench.step.meters import allocated
from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry
from mimae.model.mimae import MIMAE


def count_memory(held: Sequence[tuple[Contest, dict[str, Any]]]) -> None:
    """Add the bytes that a step allocates to every contender, see `allocated`.

    They are None for blocks that are compiled, which choose what they keep, and for models of other projects that read
    values of tensors while they are built.
    """
    for contest, result in held:
        for name, row in result["contenders"].items():
            is_compiled = name == "compiled" or result["compiled_blocks"]
            row["counted"] = None if is_compiled else _count(contest, name, row["attention"])


def _count(contest: Contest, name: str, attention: str | None) -> dict[str, int] | None:
    for another in contest.versions:
        if another.name == name:
            with another.start(torch.device("cpu")) as version:
                return version.allocated()
    kind, recipe = contest.contender(name)
    try:
        return allocated(lambda: _contender(kind, recipe, torch.device("cpu"), attention))
    except DataDependentOutputException:  # Tensors without memory have no values.
        return None


def measure_memory(held: Sequence[tuple[Contest, dict[str, Any]]], device: torch.device) -> None:
    """Add `peak_bytes` to every contender, each from a separate process; None if that ran out of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # Free the memory that the contests left in this process.
    for contest, result in held:
        for name, contender in result["contenders"].items():
            contender["peak_bytes"] = None
            another = next((each for each in contest.versions if each.name == name), None)
            if another is not None:
                with another.start(device) as version:
                    contender["peak_bytes"] = version.peak()
                continue
            with (
                suppress(BrokenProcessPool, torch.OutOfMemoryError),
                ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
            ):
                job = pool.submit(peak_memory, *contest.contender(name), device, contender["attention"])
                contender["peak_bytes"] = job.result()


def peak_memory(name: str, recipe: Recipe, device: torch.device, attention: str | None = None) -> int:
    """Bytes that two training steps of a contender add at most to a process that has imported it.

    Meant for a fresh process: on the CPU it is the peak of resident memory.
    """
    _take_steps(name, _miniature(recipe), device, attention)  # This is for imports, and the memory that libraries keep.
    before = resident_bytes("VmRSS")
    _take_steps(name, recipe, device, attention)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM") - before


def _take_steps(name: str, recipe: Recipe, device: torch.device, attention: str | None) -> None:
    """Run the first steps of a contender with random weights."""
    contender = _contender(name, recipe, device, attention)
    contender.warm_up()
    contender.timed(1)


def _contender(name: str, recipe: Recipe, device: torch.device, attention: str | None) -> Contender:
    """Return a contender with random weights."""
    module = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    state, images = module.state_dict(), batch_of(recipe)
    if name == OURS:
        return Ours(recipe, state, images, device)
    return Baseline(name, recipe, state, images, device, attention)


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
