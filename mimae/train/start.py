"""The start of a run: the check that this process can start workers, and the first lines that the run prints."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mimae import distributed
from mimae.config.layers import text
from mimae.config.recipe import RunRecipe
from mimae.data.loading.loader import Loader
from mimae.data.sources.cache import cache_note
from mimae.errors import UserError
from mimae.optim.resolution import in_words, shares, stages
from mimae.plan.gpus import device_name
from mimae.train.task import Task


def check_process(recipe: RunRecipe) -> None:
    """Raise UserError if the caller's process may not start the loader's worker processes."""
    if multiprocessing.current_process().daemon and recipe.data.workers != 0:
        raise UserError(
            f"data.workers={'null' if recipe.data.workers is None else recipe.data.workers}: this process is daemonic, "
            "like the workers of a pool, so Python does not let it start processes; use data.workers=0, or call "
            "pretrain from a process with daemon=False"
        )


def first_lines(
    task: Task[Any], loader: Loader, parameters: int, steps: int, choices: str, device: torch.device, run: Path
) -> Iterator[str]:
    """Yield the first lines of a run of `steps` steps: its data, its model, its machine, and hints.

    `choices` is a text about the values that replace `auto`; `run` is the run directory.
    """
    recipe, source, validation = task.recipe, task.source, task.validation
    yield (
        f"{len(source):,} images of {source.name}, {loader.steps_per_epoch} steps of "
        f"{task.batch_in_words()} per epoch, {steps} steps in total; "
        f"each epoch leaves out {len(loader.dropped(0))} of the images\n"
        f"{parameters / 1e6:.1f} M parameters on {distributed.world_size()} x {device_name(device)}, "
        f"{recipe.precision}; the run is {run}\n"
        f"data.crop_scale={text(recipe.data.crop_scale)}, data.mean={text(recipe.data.mean)}, "
        f"data.std={text(recipe.data.std)}; {choices}"
    )
    yield from source.notes
    if validation is not None:
        yield from (f"data.val_path: {note}" for note in validation.notes)
    yield from task.notes()
    yield from hints(recipe, steps, loader.steps_per_epoch)
    if recipe.data.cache is not None:
        yield cache_note(recipe.data, source)


def hints(recipe: RunRecipe, steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Yield warnings about a run of `steps` steps whose schedule may not be intended.

    They depend on the number of steps in an epoch, which the settings alone do not show.
    """
    schedule = recipe.schedule
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if warmup >= steps > 1:
        limit = "" if schedule.max_steps is None else f" (schedule.max_steps={schedule.max_steps})"
        yield (
            f"the run ends inside its warm-up: it has {steps} steps{limit}, and the learning rate rises for {warmup} "
            f"(schedule.warmup_epochs={schedule.warmup_epochs:g}); for a short trial of the whole schedule use "
            f"schedule.warmup_epochs={max(1, steps // 10) / steps_per_epoch:.2g}"
        )
    found = stages(schedule, recipe.data.size_hw, steps)
    met = {stage.size_hw for stage in found}
    lost = [in_words(size_hw) for size_hw, _ in shares(schedule, recipe.data.size_hw) if size_hw not in met]
    if lost:
        yield (
            f"no step has images of {', '.join(lost)}: the run has {steps} steps, too few for all stages of "
            "schedule.resolution"
        )
    if recipe.run.dry and len(found) > 1:
        yield (
            f"a dry run takes one step, with images of that step's size; {in_words(found[-1].size_hw)} come after step "
            f"{found[-1].first}: to try the memory that they need, use schedule.resolution=[] and another run.dir"
        )
    if recipe.ema.decay is not None and steps * (1 - recipe.ema.decay) < 1:
        yield (
            f"the average of the weights reaches back 1 / (1 - ema.decay) = {1 / (1 - recipe.ema.decay):.0f} steps, "
            f"more than the {steps} of the run: it stays close to the initial weights"
        )
