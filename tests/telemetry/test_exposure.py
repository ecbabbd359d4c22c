"""Tests of the bytes that ranks send and of the exposed share, compared with the traffic between two processes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mimae import distributed
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.engines.base import Engine
from mimae.model.masking import views
from mimae.plan.communication import bytes_sent
from mimae.telemetry import exposure
from mimae.telemetry.exposure import Exposure
from mimae.train.tasks.pretrain import engine_of
from tests.rank_processes import run_ranks

CPU = torch.device("cpu")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp, replicas": {"kind": "fsdp", "replicas": 2},
    "zero1": {"kind": "zero1"},
    "zero2": {"kind": "zero2"},
    "zero3": {"kind": "zero3"},
}
ACCUMULATE, IMAGES = 3, 2


def recipe(name: str, ranks: int) -> Recipe:
    """Return a recipe with far more bytes of weights than of latents.

    Most weights are in matrices of more than 1e5 numbers, since ZeRO-3 does not partition smaller ones.
    """
    tree = {
        "precision": "fp32",
        "data": {"image_size": 8},
        "masking": {"num_masks": 2, "ratio": 0.5},
        "model": {"patch_size": 4, "width": 384, "depth": 2, "heads": 2},
        "decoder": {"width": 320, "depth": 2, "heads": 2},
        "objective": {"posterior_width": 8},
        "schedule": {"batch_size": IMAGES * ranks * ACCUMULATE, "accumulate": ACCUMULATE},
        "engine": ENGINES[name],
    }
    return load_recipe(tree).recipe


def step(engine: Engine, settings: Recipe, seed: int) -> None:
    ids = torch.arange(IMAGES) + IMAGES * distributed.rank()
    generator = torch.Generator().manual_seed(seed + 100 * distributed.rank())
    for micro in range(ACCUMULATE):
        images = torch.randint(0, 256, (IMAGES, 8, 8, 3), generator=generator, dtype=torch.uint8)
        with engine.accumulate(is_last=micro == ACCUMULATE - 1):
            losses = engine.forward(images, *views(settings, 0, 0, ids))
            engine.backward(losses.loss / ACCUMULATE)
    engine.step(1.0)


def written() -> int:
    """Return the bytes that this process has written by system calls, sockets included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def of_engine(name: str) -> dict[str, Any]:
    """Return a step's sent bytes, collectives and exposed share, and its final weights with and without profiling."""
    settings, ends = recipe(name, distributed.world_size()), []
    for wanted in (False, True):
        engine, measure = engine_of(settings, CPU), Exposure(CPU)
        for i in range(2):  # ZeRO-3 learns the order of the modules in the first step
            step(engine, settings, i)
        with measure.measured(wanted):
            step(engine, settings, 2)
        ends.append(torch.cat([part.values.detach().flatten() for part in engine.parts.values()]))
    found = {"share": measure.read(), "read twice": measure.read(), "same bits": torch.equal(*ends)}
    before = written()
    step(engine, settings, 3)
    found["sent"] = written() - before
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(engine, settings, 4)
    names = Counter(event.name() for event in profiled.profiler.kineto_results.events())  # type: ignore[union-attr]
    ops = ("_allgather_base_", "allreduce_", "_reduce_scatter_base_")
    return found | {"counts": [names[f"c10d::{op}"] for op in ops]}


def late(beside: Callable[[Path], None], arrived: Path) -> float | None:
    """Return this rank's exposed share of an all-gather that rank 0 joins 0.3 s late, once `arrived` exists.

    Meanwhile rank 1 runs `beside`.
    """
    measure = Exposure(CPU)
    distributed.all_sum(torch.zeros(1))
    with measure.measured(True):
        if distributed.rank() == 0:
            time.sleep(0.3)
        gathered = distributed.start_all_gather(torch.ones(1))
        if distributed.rank() == 0:
            arrived.touch()
        else:
            beside(arrived)
        gathered()
    return measure.read()


def compute(arrived: Path) -> None:
    """Compute until 0.2 s after the other rank has arrived, however long that takes on a busy machine."""
    end, a = math.inf, torch.ones(512, 512)
    while time.monotonic() < end:
        a @ a
        if end == math.inf and arrived.exists():
            end = time.monotonic() + 0.2


def late_ranks(folder: Path) -> dict[str, Any]:
    return {"idle": late(lambda _: None, folder / "idle"), "busy": late(compute, folder / "busy")}


def engines(*names: str) -> dict[str, Any]:
    return {name: of_engine(name) for name in names}


def both(folder: Path) -> dict[str, Any]:
    return late_ranks(folder) | engines("ddp", "fsdp")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(2, folder, both, folder)


def check(found: list[dict[str, Any]], name: str, counts: list[int]) -> None:
    told = bytes_sent(recipe(name, len(found)), len(found), CPU)
    for rank in found:
        assert rank[name]["sent"] == pytest.approx(told, rel=0.02)
        assert rank[name]["counts"] == counts
        assert 0 < rank[name]["share"] < 1 and rank[name]["read twice"] is None
        assert rank[name]["same bits"], "a profiled step is a step as any other"


@pytest.mark.slow
def test_a_late_rank_is_seen_unless_computing_hides_it(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["idle"] > 0.8
    assert ranks[1]["busy"] < 0.2


# Numbers of all-gathers, all-reduces and reduce-scatters in a step. The objective gathers latents, moments and
# log-sum-exps, and sums V's terms and the losses: 9 all-gathers and 6 all-reduces for three micro-batches.


@pytest.mark.slow
def test_ddp_reduces_each_bucket_once(ranks: list[dict[str, Any]]) -> None:
    """Expect two buckets: DDP's first bucket has 1 MiB, and the second has room for 25 MiB."""
    check(ranks, "ddp", [9, 6 + 2, 0])


@pytest.mark.slow
def test_fsdp_reduces_shares_with_every_micro_batch(ranks: list[dict[str, Any]]) -> None:
    """Expect all-gathers of root and four blocks, of the blocks again for backward, and one sum of norms."""
    check(ranks, "fsdp", [9 + 3 * 9, 6 + 1, 3 * 5])


@pytest.mark.slow
def test_zero(tmp_path: Path) -> None:
    """Expect one bucket, reduced once or per micro-batch; norms and checks; an all-gather for each of three groups."""
    found = run_ranks(2, tmp_path, engines, "zero1", "zero2", "zero3")
    check(found, "zero1", [9 + 3, 6 + 1 + 6, 0])
    check(found, "zero2", [9 + 3, 6 + 3 + 6, 0])
    check(found, "zero3", [59, 6 + 6, 3])


@pytest.mark.slow
def test_replicas_reduce_with_the_last_micro_batch_alone(tmp_path: Path) -> None:
    check(run_ranks(4, tmp_path, engines, "fsdp, replicas"), "fsdp, replicas", [9 + 3 * 9, 6 + 1 + 5, 3 * 5])


def test_what_stands_alone_is_what_nothing_covers() -> None:
    collectives = [(5, 10), (8, 14), (20, 30), (40, 41)]
    computing = [(0, 6), (9, 11), (24, 26), (25, 27), (39, 45)]
    assert exposure.exposed(collectives, computing) == (9 - 6) + (14 - 11) + (24 - 20) + (30 - 27)
    assert exposure.exposed([], computing) == exposure.exposed([], []) == 0


def test_on_cuda_kernels_count_alone() -> None:
    def event(name: str, device: DeviceType, annotation: bool = False) -> Any:
        values = {"name": name, "device_type": device, "is_user_annotation": annotation, "start_ns": 1, "end_ns": 2}
        return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})

    events = [
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", DeviceType.CUDA),
        event("nccl:all_reduce", DeviceType.CUDA, annotation=True),
        event("sm90_xmma_gemm", DeviceType.CUDA),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, annotation=True),
        event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA),
        event("cudaLaunchKernel", DeviceType.CPU),
    ]
    assert exposure._spans(events, on_cuda=True) == ([(1, 2)], [(1, 2)])
    assert exposure._spans(events, on_cuda=False) == ([], [])


def test_one_rank_is_not_profiled() -> None:
    measure = Exposure(CPU)
    with measure.measured(True):
        pass
    assert measure.read() is None
