"""Tests of runs that change the number of ranks and the engine at checkpoints, against an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mimae import distributed
from mimae.train.tasks.pretrain import pretrain
from mimae.train.trainer import Trainer
from tests.image_folders import noise, two_classes
from tests.rank_processes import run_ranks
from tests.train.test_trainer import lines, recipe

RANKS = (1, 2, 4, 1)
"""Number of ranks in each step. The first two changes are in the middle of an epoch. A micro-batch has 8 images."""

WAYS = {kind: [kind] * 4 for kind in ("ddp", "fsdp", "zero1", "zero2", "zero3")} | {
    "all": ["ddp", "fsdp", "zero3", "ddp"],
}
"""Engines of each run, by step."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 50 images of two classes: 3 steps per epoch, 2 images are left out."""
    return two_classes(tmp_path_factory.mktemp("images"), noise(50, seed=0))


def _run(images: Path, run: Path, *overrides: str) -> int:
    return pretrain(recipe(images, run, "schedule.batch_size=16", "schedule.max_steps=4", *overrides)).step


def _one_step_of_each(images: Path, runs: Path, step: int) -> list[tuple[int, list[int]]]:
    """Take one more step of every run, and return (steps done, ids of this rank's images) for each."""
    leave, distributed.shutdown = distributed.shutdown, lambda: None  # DeepSpeed does not outlive its process group
    take, seen = Trainer.take, list[int]()

    def noting(self: Any) -> Any:
        batch = take(self)
        seen.extend(batch.sample_ids.tolist())
        return batch

    Trainer.take = noting
    found = []
    try:
        for way, kinds in WAYS.items():
            done = _run(images, runs / way, f"engine.kind={kinds[step]}", "run.dry=true")
            found.append((done, [*seen]))
            seen.clear()
    finally:
        distributed.shutdown = leave
        Trainer.take = take
    return found


@pytest.mark.slow
def test_runs_go_through_numbers_of_ranks_and_engines(images: Path, tmp_path: Path) -> None:
    _run(images, tmp_path / "whole")
    whole = lines(tmp_path / "whole" / "metrics.jsonl")
    ids: list[list[set[int]]] = []
    for step, ranks in enumerate(RANKS):
        (tmp_path / str(step)).mkdir()
        found = run_ranks(ranks, tmp_path / str(step), _one_step_of_each, images, tmp_path, step)
        assert all(done == step + 1 for rank in found for done, _ in rank)
        ids.append([{i for rank in found for i in rank[way][1]} for way in range(len(WAYS))])
    # The same global batches: 16 images, each once, the same for every way.
    assert all(len(batch) == 16 and batch == batches[0] for batches in ids for batch in batches)
    assert not set.union(*(batches[0] for batches in ids[:2])) & ids[2][0]
    for way in WAYS:
        records = lines(tmp_path / way / "metrics.jsonl")
        assert len(records) == len(whole) == 4
        for key in ("loss", "rec", "max_mi", "min_mi", "grad_norm", "lr"):
            got, want = ([record[key] for record in run] for run in (records, whole))
            # CLUB is a difference of terms of order 1, so it has their rounding even where it is small.
            rounding = 8 * torch.finfo(torch.float32).eps if key == "min_mi" else 0.0
            assert got == pytest.approx(want, rel=1e-5, abs=rounding)
        # Evaluated on every rank where a forward is a collective.
        checked = {record["step"]: record["val_rec"] for record in lines(tmp_path / way / "epochs.jsonl")}
        for record in lines(tmp_path / "whole" / "epochs.jsonl"):
            assert checked[record["step"]] == pytest.approx(record["val_rec"], rel=1e-4)
