"""Memory of a training step: its peak in a fresh process for each contender, and its tensors, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from mimae.bench.machine import resident_bytes
from mimae.bench.step.contenders import OURS, Baseline, Contender, Ours, batch_of
from mimae.bench.step.contest import Contest, reason
from mimae.bench.step.meters import allocated
from mimae.config.recipe import Recipe
from mimae.model.attention_choice import CANDIDATES
from mimae.model.geometry import geometry
from mimae.model.mimae import MIMAE


def count_memory(held: Sequence[tuple[Contest, dict[str, Any]]]) -> None:
    """Add the bytes that a step allocates to every contender, see `allocated`.

    They are None for blocks that are compiled, which choose what they keep, and for models of other projects that read
    values of tensors while they are built. For a contender that fails, the reason is in `counted_skipped`.
    """
    for contest, result in held:
        for name, row in result["contenders"].items():
            is_compiled = name == "compiled" or result["compiled_blocks"]
            try:
                row["counted"] = None if is_compiled else _count(contest, name, row["attention"])
            except Exception as error:
                row |= {"counted": None, "counted_skipped": reason(error)}


def _count(contest: Contest, name: str, attention: str | None) -> dict[str, int] | None:
    for another in contest.versions:
        if another.name == name:
            with another.start(torch.device("cpu")) as version:
                return version.allocated()
    kind, recipe = contest.contender(name)
    if recipe.model.attention not in CANDIDATES["cpu"]:
        # It needs a GPU. All fused kernels keep the same for backward as torch's own.
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "sdpa"})})
    try:
        return allocated(lambda: _contender(kind, recipe, torch.device("cpu"), attention))
    except DataDependentOutputException:  # Tensors without memory have no values.
        return None


def measure_memory(
    held: Sequence[tuple[Contest, dict[str, Any]]], device: torch.device, write: Callable[[], None] = lambda: None
) -> None:
    """Add `peak_bytes` to every contender, each from a separate process, and call `write` after each.

    It is None for a contender that fails, and the reason is then in `peak_skipped`.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # Free the memory that the contests left in this process.
    for contest, result in held:
        for name, contender in result["contenders"].items():
            try:
                contender["peak_bytes"] = _peak(contest, name, device, contender["attention"])
            except Exception as error:  # Memory, a compiler, a package or a kernel: each costs this row only.
                contender |= {"peak_bytes": None, "peak_skipped": reason(error)}
            write()


def _peak(contest: Contest, name: str, device: torch.device, attention: str | None) -> int:
    """Return the peak of a contender, from a process of its own."""
    for another in contest.versions:
        if another.name == name:
            with another.start(device) as version:
                return version.peak()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_memory, *contest.contender(name), device, attention).result()


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
    """Return a recipe with the same grid of patches and the same objective, but negligible memory.

    Its heads are 32 wide: some ways to compute attention need a multiple of eight.
    """
    grid = geometry(recipe).grid
    small = {"width": 64, "depth": 1, "heads": 2}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"image_size": (grid.rows, grid.columns)}),
            "model": recipe.model.model_copy(update={**small, "patch_size": 1}),
            "decoder": recipe.decoder.model_copy(update=small),
            "schedule": recipe.schedule.model_copy(update={"batch_size": 2}),
        }
    )
