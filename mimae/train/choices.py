"""Choice of the values that replace `auto`. The main rank chooses once; config.yaml keeps the choice for a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mimae import distributed
from mimae.config.kept import load_run
from mimae.config.recipe import RunRecipe
from mimae.data.loading import backend
from mimae.model import attention_choice
from mimae.model.attention import obstacle
from mimae.optim import resolution
from mimae.plan.gpus import device_name, peak_flops
from mimae.train.task import Task

SHARE = 0.5
"""Upper bound of the share of a GPU's peak that a step reaches; the cost model of a step gives 0.33 to 0.4."""

_KEPT = "as the run was started"


def choose(task: Task[Any], device: torch.device) -> tuple[RunRecipe, str]:
    """Return a task's recipe with `auto` replaced, and a text that reports the choices. This is a collective."""
    recipe, chosen = task.recipe, dict[str, tuple[str, str]]()
    if distributed.rank() == 0:
        run = Path(recipe.run.dir)
        kept = load_run(run, (), None, RunRecipe) if (run / "config.yaml").exists() else None
        chosen = {
            "data.loader": _loader(task, kept, device),
            "model.attention": _attention(task, kept, device),
        }
    chosen = distributed.gather_objects(chosen)[0]
    for key, (name, _) in chosen.items():
        section, _, field = key.partition(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={field: name})})
    return recipe, "; ".join(f"{key}={name}, {reason}" for key, (name, reason) in chosen.items())


def _loader(task: Task[Any], kept: RunRecipe | None, device: torch.device) -> tuple[str, str]:
    recipe = task.recipe
    if recipe.data.loader != "auto":
        return recipe.data.loader, "as set in the recipe"
    if task.reader() is not None:
        return "torch", "the only one that makes targets with the images"
    if kept is not None:
        return kept.data.loader, _KEPT
    schedule, ranks = recipe.schedule, distributed.world_size()
    images = schedule.epochs * sum(share.draws for share in task.source.shares)
    if schedule.max_steps is not None:
        images = min(images, schedule.max_steps * schedule.batch_size)
    return backend.choose(
        recipe.data,
        task.source,
        recipe.seed,
        max(1, schedule.batch_size // (schedule.accumulate * ranks)),
        images=images // ranks,
        needed=_images_per_s(task, device),
    )


def _images_per_s(task: Task[Any], device: torch.device) -> float | None:
    """Return the largest number of images per second that a rank's step can take, or None if it is unknown.

    On the CPU it is 0: step and loader share the cores, so every loader is fast enough.
    """
    if device.type == "cpu":
        return 0.0
    recipe = task.recipe
    # The smallest images take the least, and need the fastest loader.
    smallest = resolution.sizes(recipe.schedule, recipe.data.size_hw)[0]
    peak, flops = peak_flops(device_name(device), recipe.precision), task.flops(smallest)
    return None if peak is None or not flops else SHARE * peak / flops


def _attention(task: Task[Any], kept: RunRecipe | None, device: torch.device) -> tuple[str, str]:
    recipe = task.recipe
    if recipe.model.attention != "auto":
        return recipe.model.attention, "as set in the recipe"
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    made = task.attention_calls()
    if kept is None:
        return attention_choice.choose(made, device, dtype)
    # If config.yaml has auto, the run is older than this choice and used sdpa.
    name = "sdpa" if kept.model.attention == "auto" else kept.model.attention
    if (reason := obstacle(name, device, dtype, {call.width for call in made})) is None:
        return name, _KEPT
    anew, measured = attention_choice.choose(made, device, dtype)
    return anew, f"{measured}, since {name}, with which the run was started, does not run here: {reason}"
