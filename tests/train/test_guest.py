"""Tests of `mimae.pretrain` inside other programs.

These are a thread, a program with its own process group, two calls in a process, a daemonic worker, and a notebook.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

import mimae
from mimae.checkpoints import dcp

TINY: dict[str, Any] = {
    "precision": "fp32",
    "model": {"size": "tiny", "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "attention": "sdpa"},
    "decoder": {"width": 8, "depth": 1, "heads": 2},
    "telemetry": {"tensorboard": False, "images_every_epochs": 0, "probe_every_epochs": 0, "log_every_steps": 1},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def pretrain(images: Path, run: Path, workers: int | None = 0, steps: int = 2) -> Any:
    data = {"path": str(images), "image_size": 32, "workers": workers, "loader": "torch"}
    schedule = {"batch_size": 4, "epochs": 4, "max_steps": steps, "warmup_epochs": 0}
    return mimae.pretrain(TINY | {"data": data, "schedule": schedule, "run": {"dir": str(run)}})


def weights(run: Path, step: int) -> dict[str, Any]:
    return {
        k: v.nan_to_num().tolist() for k, v in dcp.load_whole(run / f"checkpoints/step-{step:08d}", "model.").items()
    }


def test_in_a_thread_it_trains_as_in_the_main_one(images: Path, tmp_path: Path) -> None:
    """Train in a thread, also with a loader worker; the process keeps its signal handlers."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)]
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(pretrain(images, tmp_path / "thread", workers=1)))
    thread.start()
    thread.join()
    assert outcomes and outcomes[0].finished
    pretrain(images, tmp_path / "main")
    assert weights(tmp_path / "thread", 2) == weights(tmp_path / "main", 2)
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)]
    assert after == before


def test_beside_a_callers_process_group_and_twice_it_trains_as_alone(images: Path, tmp_path: Path) -> None:
    """Continue in the second call from the checkpoint of the first."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.distributed_c10d._get_default_group()
        pretrain(images, tmp_path / "guest", steps=2)
        assert pretrain(images, tmp_path / "guest", steps=2).finished, "there is nothing left to do"
        assert dist.distributed_c10d._get_default_group() is group
    finally:
        dist.destroy_process_group()
    for _ in range(2):
        assert pretrain(images, tmp_path / "alone").finished
        assert not dist.is_initialized()
    assert weights(tmp_path / "guest", 2) == weights(tmp_path / "alone", 2)


def test_with_the_output_and_the_event_loop_of_a_notebook(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as in a notebook's cell: in an event loop, with output streams that have no file descriptor."""
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", output)

    async def cell() -> Any:
        return pretrain(images, tmp_path / "run", workers=1)

    assert asyncio.run(cell()).finished
    assert "step 2/2" in output.getvalue()


def in_a_worker(told: Connection, images: Path, run: Path) -> None:
    said = []
    for workers in (1, None, 0):
        try:
            said.append(str(pretrain(images, run, workers).finished))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    told.send(said)


@pytest.mark.slow
def test_in_a_daemonic_worker_it_trains_without_workers_or_says_so(images: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=in_a_worker, args=(theirs, images, tmp_path / "run"), daemon=True)
    process.start()
    said = ours.recv()
    process.join()
    assert said[0].startswith("UserError: data.workers=1: this process is daemonic")
    assert said[1].startswith("UserError: data.workers=null: this process is daemonic")
    assert said[2] == "True"
