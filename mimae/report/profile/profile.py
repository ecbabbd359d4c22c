"""The profile of a recipe's step, in three passes with the same engine, so that the measurements do not interfere.

1. Memory: every allocation of two steps is recorded.
2. Time: unmodified steps are timed; then steps with a mark on every part run under the profiler.
3. Counts: the FLOPs and bytes of each operator are counted, in two steps.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from mimae import distributed, kernels
from mimae.config.recipe import Recipe, RunRecipe
from mimae.engines.compiling import will_compile
from mimae.outside.progress import Progress
from mimae.plan import memory as planned
from mimae.plan.gpus import device_name, peak_flops
from mimae.plan.memory import Layout, parameters
from mimae.report.profile import memory
from mimae.report.profile.counts import Counts
from mimae.report.profile.marks import marked
from mimae.report.profile.memory import Memory
from mimae.report.profile.phases import OTHER, Phase, phases
from mimae.report.profile.step import Steps, task_of
from mimae.telemetry.memory import memory as process_memory

WARM_UP = 2
"""Number of steps before the timing, in which blocks are compiled and workers prepare their first batches."""


@dataclass(frozen=True)
class Profile:
    """The measurements of a profile. Seconds, FLOPs and bytes are those of one step."""

    recipe: RunRecipe
    device: str
    peak: float | None
    """FLOP/s of the device in the recipe's precision: from the data sheet, or measured with a large matrix product."""
    seconds: float
    """Median time of the steps without the profiler."""
    profiled_seconds: float
    phases: dict[str, Phase]
    forward_flops: dict[str, float]
    backward_flops: dict[str, float]
    bytes: dict[str, float]
    memory: Memory
    planned_flops: float | None
    planned_memory: dict[str, float]
    """By part; empty for tasks other than pretraining, whose memory `mimae plan` counts for GPUs."""
    resident: int | None
    """Peak resident memory of the process in bytes; on CUDA the bytes that the allocator reserved."""

    @property
    def flops(self) -> float:
        return sum(self.forward_flops.values()) + sum(self.backward_flops.values())

    @property
    def named(self) -> float:
        """Share of the profiled steps' time that is in a named phase."""
        total = sum(phase.seconds for phase in self.phases.values())
        return 1 - self.phases[OTHER].seconds / total if OTHER in self.phases else 1.0


def measure(recipe: RunRecipe, steps: int, trace: Path | None = None) -> Profile:
    """Profile `steps` steps of a recipe on this machine.

    `trace` is a folder for trace files, which viewers such as Perfetto open. Raises UserError for unusable data or
    settings.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # This hides the profiler's messages on stderr.
    device = distributed.setup()
    try:
        task = task_of(recipe, device)
        taken = Steps(task, device)
        try:
            with Progress("profiling", 3) as progress:
                progress.begin("memory")
                of_memory = memory.measure(taken)
                return _measure(taken, of_memory, steps, trace, progress)
        finally:
            taken.close()
    finally:
        distributed.shutdown()


def _measure(taken: Steps, of_memory: Memory, steps: int, trace: Path | None, progress: Progress) -> Profile:
    recipe, device = taken.recipe, taken.device
    on_cuda = device.type == "cuda"
    progress.begin("time")
    seconds = _timed(taken, steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with marked(taken.engine.model):
        taken.step()
        with profile(activities=activities) as profiled:
            for _ in range(steps):
                taken.step()
        if trace is not None:
            _write_trace(taken, activities, trace)
    results: Any = profiled.profiler
    found = phases(results.kineto_results.events(), on_cuda)
    progress.begin("FLOPs and bytes")
    flops, moved = count(taken)
    planned_flops = taken.task.flops(recipe.data.size_hw)
    whole = process_memory(device)
    return Profile(
        recipe=recipe,
        device=device_name(device),
        peak=(peak_flops(device_name(device), recipe.precision) if on_cuda else None) or matrix_rate(recipe, device),
        seconds=statistics.median(seconds),
        profiled_seconds=sum(phase.seconds for phase in found.values()),
        phases=found,
        forward_flops=dict(flops.forward_flops),
        backward_flops=dict(flops.backward_flops),
        bytes=dict(moved.bytes),
        memory=of_memory,
        planned_flops=planned_flops and planned_flops * recipe.schedule.batch_size / distributed.world_size(),
        planned_memory=_planned_memory(recipe, on_cuda) if isinstance(recipe, Recipe) else {},
        resident=whole["mem_reserved_bytes"] if on_cuda else whole["mem_peak_bytes"],
    )


def _planned_memory(recipe: Recipe, on_cuda: bool) -> dict[str, float]:
    layout = Layout(recipe.engine.kind, distributed.world_size(), recipe.engine.replicas, recipe.engine.offload)
    images = recipe.schedule.batch_size // (recipe.schedule.accumulate * layout.ranks)
    foreseen = planned.memory(recipe, layout, images, count=parameters(recipe), ops="fused" if on_cuda else "plain")
    return foreseen._asdict()


def _timed(taken: Steps, steps: int) -> list[float]:
    """Return the seconds of each step without the profiler."""
    for _ in range(WARM_UP):
        taken.step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        taken.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def count(taken: Steps) -> tuple[Counts, Counts]:
    """Return the counts of FLOPs of one step, and the counts of bytes of another step.

    FLOPs are counted with plain ops and attention as two products, because torch has formulas for these. Bytes are
    counted with the ops that training uses.
    """
    flops, moved = Counts(), Counts()
    with torch.compiler.set_stance("force_eager"):
        with (
            marked(taken.engine.model, flops.mark),
            sdpa_kernel(SDPBackend.MATH),
            kernels.prefer("reference"),
            flops,
        ):
            taken.step(flops.mark)
        with marked(taken.engine.model, moved.mark), moved:
            taken.step(moved.mark)
    return flops, moved


def matrix_rate(recipe: RunRecipe, device: torch.device, seconds: float = 0.3) -> float:
    """Return the FLOP/s of the product of two square matrices in the recipe's precision, by its best time."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    del product
    return 2 * side**3 / best


def is_compiled(found: Profile) -> bool:
    """Return True if the blocks of the profiled step were compiled."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return will_compile(found.recipe.compile, torch.device(kind))


def _write_trace(taken: Steps, activities: list[ProfilerActivity], folder: Path) -> None:
    """Write trace.json.gz with stacks and shapes of two steps, for Perfetto or chrome://tracing.

    On CUDA also write memory.pickle, for pytorch.org/memory_viz.
    """
    on_cuda = taken.device.type == "cuda"
    if on_cuda:
        torch.cuda.memory._record_memory_history()
    with profile(activities=activities, with_stack=True, record_shapes=True) as profiled:
        for _ in range(2):
            taken.step()
    profiled.export_chrome_trace(str(folder / "trace.json.gz"))
    if on_cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
