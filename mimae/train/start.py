"""Looked at before the first step: whether this process can hold the run, and what of its schedule is worth a word."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mimae.errors import UserError

if TYPE_CHECKING:
    from mimae.config.recipe import RunRecipe


def check_process(recipe: RunRecipe) -> None:
    """Raise UserError where the caller's process may not start what the run needs."""
    if multiprocessing.current_process().daemon and recipe.data.workers != 0:
        raise UserError(
            f"data.workers={'null' if recipe.data.workers is None else recipe.data.workers}: this process is daemonic, "
            "as the workers of a pool are, and Python lets it start no processes; legal is data.workers=0, or call "
            "pretrain from a process with daemon=False"
        )


def hints(recipe: RunRecipe, steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Yield what a person may not have meant in a run of `steps`, and could not see in its settings alone."""
    schedule = recipe.schedule
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if warmup >= steps > 1:
        limit = "" if schedule.max_steps is None else f" (schedule.max_steps={schedule.max_steps})"
        yield (
            f"the run ends inside its warm-up: {steps} steps{limit}, and the learning rate rises for {warmup} "
            f"(schedule.warmup_epochs={schedule.warmup_epochs:g}); a short trial of the whole schedule takes "
            f"schedule.warmup_epochs={max(1, steps // 10) / steps_per_epoch:.2g}"
        )
    if recipe.ema.decay is not None and steps * (1 - recipe.ema.decay) < 1:
        yield (
            f"the average of the weights reaches back 1 / (1 - ema.decay) = {1 / (1 - recipe.ema.decay):.0f} steps, "
            f"beyond all {steps} of the run: it stays close to the initial weights"
        )
