"""Tests that no rank holds all the source weights from which a sharded model starts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mimae import distributed
from mimae.model.mimae import build
from mimae.train import task as tasks
from mimae.train.tasks.pretrain import Pretrain, pretrain
from mimae.weights.names import to_timm, to_transformers
from tests.rank_processes import run_ranks
from tests.weights.conftest import encoder_of, perturbed, recipe

MODEL = ["model.width=512", "model.depth=8", "model.heads=8"]  # 25 M weights, 101 MB; the largest tensor has 4 MB

ALLOWED = 20e6
"""Allowed bytes of a rank beside its shards: chunks of a tensor and the allocator's cache. A full copy has 100 MB."""


def anonymous() -> int:
    """Return the bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def growth(function: Callable[[], None]) -> int:
    """Return by how many bytes the process grows at its peak while a function runs."""
    over, peak, before = threading.Event(), 0, anonymous()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.001):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    over.set()
    thread.join()
    return max(peak, anonymous()) - before


def start(images: Path, run: Path, init: str, engine: str, wanted: Path) -> dict[str, Any]:
    """Start a rank; return by how much its memory grew, and the shards that differ from the source."""
    grown: list[int] = []
    place = tasks.place
    tasks.place = lambda *args: grown.append(growth(lambda: place(*args)))  # type: ignore[assignment]
    found = Pretrain(recipe(images, run, *MODEL, f"model.init={init}", f"engine.kind={engine}")).engine(
        torch.device("cpu")
    )
    whole = torch.load(wanted, mmap=True)
    wrong = [
        name
        for name, part in found.parts.items()
        if name in whole and not torch.equal(part.values.detach(), part.of(whole[name]))
    ]
    held = sum(part.values.numel() for part in found.parts.values())
    return {"grown": grown[0], "wrong": wrong, "held": held / found.num_parameters, "rank": distributed.rank()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_each_rank_reads_its_own_parts(
    images: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    if engine == "zero3":
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    model = build(recipe(images, tmp_path / "model", *MODEL))
    weights = encoder_of(perturbed(model))
    torch.save({"model": to_timm(weights)}, tmp_path / "vit.pth")
    theirs = {name: tensor.contiguous() for name, tensor in to_transformers(weights).items()}
    save_file(theirs, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "wanted.pt")
    source = tmp_path / "source"
    pretrain(recipe(images, source, *MODEL, f"model.init={tmp_path / 'vit.pth'}", "optimizer.learning_rate=1e-30"))
    for init in (tmp_path / "vit.pth", tmp_path / "model.safetensors", source):
        folder = tmp_path / f"ranks-{init.name}"
        folder.mkdir()
        for found in run_ranks(
            2, folder, start, images, tmp_path / f"run-{init.name}", str(init), engine, tmp_path / "wanted.pt"
        ):
            print(engine, init.name, found)
            assert not found["wrong"], found
            assert 0.4 < found["held"] < 0.6, "the model is spread"
            assert found["grown"] < ALLOWED, found
