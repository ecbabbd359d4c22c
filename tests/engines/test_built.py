"""Tests of optional parts of DeepSpeed: its own CPU Adam, and an optimizer in files (offload=nvme)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimae import distributed
from mimae.engines import zero
from mimae.optim import adamw
from mimae.train.tasks.pretrain import engine_of
from tests.engines.test_engines import WEIGHTS, apart, everything, recipe, saved, train
from tests.rank_processes import run_ranks

CPU = torch.device("cpu")
WIDE = ["decoder.width=64", "engine.kind=zero3", "optimizer.clip=null"]
"""Settings for more than 1 MB, because DeepSpeed keeps smaller tensors in memory. Clipping is off, because norms of
more partitions round differently."""

ADAM = {kind: [f"engine.kind={kind}", "optimizer.impl=deepspeed"] for kind in ("zero1", "zero2", "zero3")} | {
    "fsdp, offload": ["engine.kind=fsdp", "engine.offload=cpu", "optimizer.impl=deepspeed"]
}


def _needs(*ops: str) -> pytest.MarkDecorator:
    missing = [op for op in ops if not adamw.has_op(op)]
    return pytest.mark.skipif(bool(missing), reason=f"DeepSpeed was built without {', '.join(missing)}")


def _train_with_adam() -> dict[str, dict[str, Any]]:
    return {kind: everything(overrides) for kind, overrides in ({"torch": ["engine.kind=zero2"]} | ADAM).items()}


@_needs("cpu_adam")
def test_deepspeeds_adam_steps_as_torchs(tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path, _train_with_adam)[0]
    want = found.pop("torch")
    for got in found.values():
        assert got["losses"] == pytest.approx(want["losses"], rel=WEIGHTS)
        for section in ("model", "optimizer", "ema"):
            assert apart(got["end"][section], want["end"][section]) < WEIGHTS
            assert apart(got["after the skipped step"][section], got["end"][section]) == 0


Saved = dict[str, dict[str, Tensor]]


def _through_a_checkpoint(overrides: list[str], folder: Path) -> tuple[list[float], Saved, Saved]:
    """Return the losses, the state after 2 steps, and the state after 2 more steps of an engine that loaded it."""
    settings, found, losses = recipe(*WIDE, *overrides), [], []
    for part in range(2):
        engine = engine_of(settings, CPU)
        if part:
            engine.load(folder)
        losses += train(engine, settings, range(2 * part, 2 * part + 2))[0]
        found.append(saved(engine, folder if part == 0 else None))
    return losses, found[0], found[1]


def _in_files(folder: Path, width: int) -> tuple[Any, Any, list[str]]:
    """Return the results of an optimizer in host memory and of one in files, and the names of the files."""
    vars(zero)["bucket"] = lambda _: 300_000  # A group of parameters then has several partitions.
    disk, wide = folder / "disk", f"model.width={width}"
    offloaded = [wide, "engine.offload=nvme", f"engine.offload_path={disk}"]
    in_memory = _through_a_checkpoint([wide, "engine.offload=cpu"], folder / "memory")
    in_files = _through_a_checkpoint(offloaded, folder / "files")
    distributed.gather_objects(None)  # The first process removes them all.
    return in_memory, in_files, sorted(file.name for file in disk.glob(f"**/rank{distributed.rank()}/*.swp"))


# With the second and third width there are gradients in files. With the third width most of them would be read to
# unaligned offsets.
@pytest.mark.parametrize(("ranks", "width"), [(2, 320), (1, 320), (1, 340)])
@_needs("async_io", "pin_memory")
def test_an_optimizer_in_files_is_the_one_in_memory(tmp_path: Path, ranks: int, width: int) -> None:
    (tmp_path / "disk").mkdir()
    found = run_ranks(ranks, tmp_path, _in_files, tmp_path, width)
    for in_memory, in_files, files in found:
        assert in_files[0] == in_memory[0]
        for kind in ("exp_avg-", "exp_avg_sq-", ""):
            assert sum(name.startswith(kind) for name in files) > 1
        assert any("gradient" in name for name in files) == (ranks == 1)
    (_, *in_memory), (_, *in_files), _ = found[0]
    for got, want in zip(in_files, in_memory, strict=True):
        for section in want:
            assert all(torch.equal(got[section][name], tensor) for name, tensor in want[section].items())
    assert not [*(tmp_path / "disk").iterdir()], "files outlive the process"
