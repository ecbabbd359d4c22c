"""Speed and memory of the engines on this machine's CPU, a few ranks each.

Every engine has processes of its own, which are all there at once and take turns, round by round: what slows the
machine for a while slows all. Memory is what a rank's process grows by at its highest, from one that has taken a step
of a smaller model with the same engine. Images are noise.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimae import distributed
from mimae.bench.machine import resident_bytes
from mimae.bench.step.contenders import batch_of
from mimae.config.recipe import Recipe
from mimae.engines.base import Engine
from mimae.errors import UserError
from mimae.model.masking import views
from mimae.outside.progress import track
from mimae.plan.communication import traffic
from mimae.plan.gpus import find_gpu
from mimae.plan.memory import Layout, parameters
from mimae.train.tasks.pretrain import engine_of

ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "fsdp": ["engine.kind=fsdp"],
    "fsdp, offload": ["engine.kind=fsdp", "engine.offload=cpu"],
    "zero1": ["engine.kind=zero1"],
    "zero2": ["engine.kind=zero2"],
    "zero3": ["engine.kind=zero3"],
}
"""Overrides of a recipe by the name of the engine."""

MODEL = ["model.size=small", "decoder.width=256", "decoder.depth=4", "decoder.heads=4", "data.image_size=112"]
"""Overrides for a model whose weights, gradients and moments are larger than its activations."""

PATIENCE = 300.0
"""Longest time in seconds for an answer of a rank."""


@contextmanager
def _started(recipes: Mapping[str, Recipe], ranks: int) -> Iterator[dict[str, list[Any]]]:
    """Start a process for each rank of each engine, and yield the pipes to them."""
    context = get_context("spawn")
    pipes: dict[str, list[Any]] = {name: [] for name in recipes}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, recipe) in enumerate(recipes.items()):
            for rank in range(ranks):
                here, there = context.Pipe()
                arguments = (there, recipe, rank, ranks, f"{folder}/{number}")
                processes.append(context.Process(target=_serve, args=arguments, daemon=True))
                processes[-1].start()
                there.close()
                pipes[name].append(here)
        try:
            yield pipes
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(name: str, pipes: Sequence[Connection]) -> list[float]:
    """Return the next message of each rank of an engine. Raises UserError if one of them has ended."""
    try:
        if all(pipe.poll(PATIENCE) for pipe in pipes):
            return [pipe.recv() for pipe in pipes]
        why = f"no answer in {PATIENCE:g} s"
    except (EOFError, ConnectionError):
        why = "it has ended, with the error above"
    raise UserError(f"a rank of {name}: {why}")


def measure(recipes: Mapping[str, Recipe], ranks: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return by engine the seconds of a step on the slowest rank in each round, and the largest memory of a rank."""
    found: dict[str, dict[str, Any]] = {}
    with _started(recipes, ranks) as pipes:
        for name, of_ranks in pipes.items():
            found[name] = {"seconds_per_step": [], "peak_bytes": max(_answers(name, of_ranks))}
        names = list(recipes)
        for number in track(range(rounds), "engines", rounds, "rounds"):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                for pipe in pipes[name]:
                    pipe.send(None)
                found[name]["seconds_per_step"].append(max(_answers(name, pipes[name])))
    return found


def _serve(pipe: Connection, recipe: Recipe, rank: int, ranks: int, meeting: str) -> None:
    """Run a rank: send its growth in memory, then the seconds of a step for each request."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", store=dist.FileStore(meeting, ranks), rank=rank, world_size=ranks)
    small = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"depth": 1}),
            "decoder": recipe.decoder.model_copy(update={"depth": 1}),
            "schedule": recipe.schedule.model_copy(update={"batch_size": 2 * ranks}),
        }
    )
    _steps(_engine(small), small, ranks, 1)
    gc.collect()
    before = resident_bytes("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # This resets the peak.
    engine = _engine(recipe)
    _steps(engine, recipe, ranks, 2)
    pipe.send(resident_bytes("VmHWM") - before)
    while True:
        pipe.recv()
        dist.barrier()
        start = time.perf_counter()
        _steps(engine, recipe, ranks, 1)
        pipe.send(time.perf_counter() - start)


def _engine(recipe: Recipe) -> Engine:
    return engine_of(recipe, distributed.setup())


def _steps(engine: Engine, recipe: Recipe, ranks: int, steps: int) -> None:
    images = batch_of(recipe)[: recipe.schedule.batch_size // ranks]
    ids = torch.arange(len(images))
    for _ in range(steps):
        visible, targets = views(recipe, recipe.seed, 0, ids)
        with engine.accumulate(is_last=True):
            losses = engine.forward(images, visible, targets)
            engine.backward(losses.loss)
        engine.step(1.0)


def sent_bytes(recipe: Recipe, ranks: int) -> float:
    """Return the bytes that a rank sends in a step, as the planner counts them."""
    layout = Layout(recipe.engine.kind, ranks, 1, recipe.engine.offload)
    sent = traffic(recipe, layout, find_gpu("h100"), ranks, parameters(recipe))
    return sum(each.bytes for each in sent if each.kind != "host")


def table(result: Mapping[str, Any]) -> str:
    """Return a result as Markdown."""
    ddp = result["engines"]["ddp"]["seconds_per_step"]
    lines = [
        "| engine | a step, in steps of ddp (min .. max) | peak memory of a rank | sent by a rank in a step |",
        "|---|---|---|---|",
    ]
    for name, row in result["engines"].items():
        ratios = [mine / theirs for mine, theirs in zip(row["seconds_per_step"], ddp, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) | "
            f"{row['peak_bytes'] / 2**20:,.0f} MiB | {row['sent_bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)
