"""`mimae plan` of a recipe that fine-tunes: its parameters, FLOPs, memory and time, counted on fake tensors.

Pretraining has formulas for each engine (`mimae.plan`); here the model is what is counted, as `mimae plan --dry-run`
does it: a step of one rank under fsdp. What ddp needs follows from the same step: it holds all weights on each GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from mimae.engines.make import make_engine, setup_of
from mimae.errors import UserError
from mimae.objective.costs import FP32
from mimae.plan import dry
from mimae.plan.cost import Fleet, micro_batch
from mimae.plan.gpus import peak_flops
from mimae.randomness import initialise
from mimae.train.task import Task
from mimae.train.tasks.registry import make_task

NOT_COUNTED = (
    "the memory of a detector is not foreseen: what its heads compute depends on the boxes that are found; a step of "
    "the run says it (mem_peak_bytes in metrics.jsonl)"
)


def document(recipe: Any, fleet: Fleet, images: int) -> dict[str, Any]:
    """Return the figures of a recipe, for a data set of so many images. Opens data.path where the number of classes
    depends on it. Raises UserError."""
    peak = peak_flops(fleet.gpu.name, recipe.precision)
    if peak is None:
        raise UserError(f"{fleet.gpu.name} has no units for precision={recipe.precision}; legal is precision=fp32")
    each, schedule = micro_batch(recipe, fleet.gpus), recipe.schedule
    task = make_task(recipe)
    model = task.outline()
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or not needed) for needed in (False, True)
    )
    steps = schedule.epochs * (images // schedule.batch_size)
    steps = steps if schedule.max_steps is None else min(steps, schedule.max_steps)
    flops = task.flops(recipe.data.size_hw)
    seconds = None if flops is None else flops * schedule.batch_size / (fleet.gpus * peak * fleet.share)
    return {
        "task": recipe.task,
        "parameters": total,
        "trained": trained,
        "gpus": fleet.gpus,
        "gpu": fleet.gpu.name,
        "images_per_step": schedule.batch_size,
        "images_per_micro_batch": each,
        "steps": steps,
        "flops_per_image": flops,
        "engines": _engines(task, fleet, each, total, trained),
        "budget_bytes": fleet.budget,
        "seconds": seconds,
        "images_per_s": None if seconds is None else schedule.batch_size / seconds,
        "hours": None if seconds is None else steps * seconds / 3600,
        "share_of_peak": fleet.share,
    }


def _engines(task: Task[Any], fleet: Fleet, images: int, total: int, trained: int) -> dict[str, dict[str, float]]:
    """Return the bytes of a GPU by engine: weights, gradients, optimizer, activations, peak; {} where what a step
    computes depends on its values."""
    if task.example(1) is None:
        return {}
    spread = task.recipe.engine.model_copy(update={"kind": "fsdp", "offload": "none", "replicas": 1})
    recipe = task.recipe = task.recipe.model_copy(update={"engine": spread})
    setup, device = setup_of(recipe), torch.device("cpu")

    def engine() -> Any:
        start = lambda model, parts: initialise(model, recipe.seed, parts)  # noqa: E731
        return make_engine(task.outline(), setup, device, task.group, start)

    def forward(engine: Any, batch: list[Any]) -> tuple[torch.Tensor, Any]:
        result = task.result(engine.forward(*batch[0]))
        return result.loss, result.shown

    job = dry.Job(setup, task.obstacles(device), engine, lambda: [task.example(images) for _ in range(2)], forward)
    found = dry.count(job, fleet.gpus, 0)
    moments = 3 if recipe.ema.decay else 2
    whole: dict[str, float] = {
        "weights": total * FP32,
        "gradients": trained * FP32,
        "optimizer": trained * FP32 * moments,
    }
    return {
        "fsdp": {
            "weights": found.weights,
            "gradients": found.gradients,
            "optimizer": found.optimizer,
            "activations": found.kept,
            "peak": found.peak,
        },
        "ddp": whole | {"activations": found.kept, "peak": sum(whole.values()) + found.kept},
    }


def report(found: dict[str, Any], fleet: Fleet) -> str:
    """Return the document as text."""
    lines = [
        f"task={found['task']}: {found['parameters'] / 1e6:,.1f} M parameters, {found['trained'] / 1e6:,.1f} M trained",
        f"{fleet.gpus} x {fleet.gpu.name}; {found['images_per_step']} images a step, "
        f"{found['images_per_micro_batch']} a GPU and micro-batch",
        f"{found['flops_per_image'] / 1e12:.3g} TFLOP a training image, "
        f"{found['flops_per_image'] * found['images_per_step'] / 1e15:.3g} PFLOP a step",
        "",
    ]
    if found["engines"]:
        names = ("weights", "gradients", "optimizer", "activations", "peak")
        lines.append("GiB a GPU" + "".join(f"{name:>13}" for name in names))
        for engine, needed in found["engines"].items():
            verdict = "fits" if needed["peak"] <= fleet.budget else "too much"
            cells = "".join(f"{needed[name] / 2**30:>13.2f}" for name in names)
            lines.append(f"  {engine:<7}{cells}  {verdict}")
    else:
        lines.append(NOT_COUNTED)
    lines += [
        "",
        f"time: {found['steps']:,} steps of {found['seconds']:.3g} s are {found['hours']:,.1f} hours, "
        f"{found['images_per_s']:,.0f} images/s",
        f"assumed: {fleet.share:.0%} of the peak while computing; communication, data and temporary memory inside of "
        f"operators are not counted; {fleet.budget / 2**30:.0f} GiB for a step",
    ]
    return "\n".join(lines)
