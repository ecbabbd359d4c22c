"""Cost of a step with each engine: memory, communication, seconds (docs/scaling.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

from mimae.engines.settings import EngineSettings
from mimae.errors import UserError
from mimae.optim.resolution import Size
from mimae.plan.communication import Traffic, exposed, traffic
from mimae.plan.flops import run_flops, step_flops
from mimae.plan.gpus import GPU, peak_flops
from mimae.plan.memory import Layout, Memory, Parameters, largest, memory

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe, RunRecipe

USABLE = 0.9
"""Assumed share of a GPU's memory for a step: the rest is the CUDA context, buffers of NCCL, and gaps."""


class Fleet(NamedTuple):
    """The GPUs of a run, and assumptions about them."""

    gpu: GPU
    gpus: int
    per_node: int
    share: float
    """Assumed share of the peak that forward and backward reach."""

    @property
    def budget(self) -> float:
        return USABLE * self.gpu.memory * 2**30


def micro_batch(recipe: RunRecipe, gpus: int) -> int:
    """Return the images of a GPU's micro-batch. Raises UserError if the batch cannot be dealt evenly."""
    schedule = recipe.schedule
    parts = gpus * schedule.accumulate
    if schedule.batch_size % parts:
        near = max(round(schedule.batch_size / parts), 1) * parts
        raise UserError(
            f"schedule.batch_size={schedule.batch_size} must be divisible by {parts} = GPUs ({gpus}) x "
            f"schedule.accumulate={schedule.accumulate}; the nearest is {near}"
        )
    return schedule.batch_size // parts


class Row(NamedTuple):
    """The cost of a step with one engine."""

    layout: Layout
    recipe: Recipe
    memory: Memory
    largest: int
    """Largest micro-batch of a rank that fits, in images."""
    traffic: list[Traffic]
    computing: float
    """Seconds of computing in a step."""
    exposed: float
    """Seconds of communication in a step that computing does not hide."""
    fits: bool

    @property
    def seconds(self) -> float:
        """Return the seconds of a step."""
        return self.computing + self.exposed

    @property
    def images_per_s(self) -> float:
        return self.recipe.schedule.batch_size / self.seconds


def layouts(ranks: int, per_node: int) -> list[Layout]:
    """Return the layouts to compare, simplest first."""
    kinds = get_args(EngineSettings.model_fields["kind"].annotation)
    others = [Layout(kind, ranks) for kind in kinds if kind != "ddp"]
    nodes = ranks // per_node
    hybrid = [Layout("fsdp", ranks, nodes)] if nodes > 1 and ranks % per_node == 0 else []
    offloaded = [Layout("fsdp", ranks, offload="cpu"), Layout("zero3", ranks, offload="nvme")]
    return [Layout("ddp", ranks), *hybrid, *others, *offloaded]


def rows(recipe: Recipe, fleet: Fleet, count: Parameters) -> list[Row]:
    """Return the cost of every engine with the recipe's micro-batch."""
    return [row(recipe, layout, fleet, count) for layout in layouts(fleet.gpus, fleet.per_node)]


def row(recipe: Recipe, layout: Layout, fleet: Fleet, count: Parameters, size_hw: Size | None = None) -> Row:
    """Return the cost of one engine with the recipe's micro-batch.

    The time is that of a step with images of `size_hw`, or the mean over the run; the memory is that of the largest
    images. Raises UserError if the GPU cannot compute in the recipe's precision.
    """
    peak = peak_flops(fleet.gpu.name, recipe.precision)
    if peak is None:
        raise UserError(f"{fleet.gpu.name} has no units for precision={recipe.precision}; legal is precision=fp32")
    forward = (step_flops(recipe, size_hw) if size_hw else run_flops(recipe)) / 3 / (fleet.gpus * peak * fleet.share)
    # Full recomputation costs one more forward.
    backward = (3 if recipe.model.checkpointing == "full" else 2) * forward
    images = recipe.schedule.batch_size // (fleet.gpus * recipe.schedule.accumulate)
    needed = memory(recipe, layout, images, count=count)
    sent = traffic(recipe, layout, fleet.gpu, fleet.per_node, count)
    waits = exposed(sent, recipe, layout, forward, backward)
    most = largest(recipe, layout, fleet.budget, count)
    return Row(layout, recipe, needed, most, sent, forward + backward, waits, needed.total <= fleet.budget)
