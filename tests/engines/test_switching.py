"""One run through several engines and numbers of ranks, by its checkpoints, against a run that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimae import loop
from tests.ranks import run_ranks
from tests.test_loop import lines, recipe

WAY = (("ddp", 1), ("fsdp", 2), ("zero3", 2), ("zero1", 3), ("fsdp", 1), ("ddp", 1))
"""Engine and ranks of each step; a step's micro-batch of 6 images is shared by 1, 2 and 3 ranks."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images of two classes: 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(36):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def _run(images: Path, run: Path, *overrides: str) -> int:
    return loop.pretrain(recipe(images, run, "schedule.batch_size=12", "schedule.epochs=2", *overrides)).step


@pytest.mark.slow
def test_a_run_goes_through_engines_and_numbers_of_ranks(images: Path, tmp_path: Path) -> None:
    _run(images, tmp_path / "whole")
    for step, (kind, ranks) in enumerate(WAY, 1):
        arguments = (images, tmp_path / "way", f"engine.kind={kind}", "run.dry=true")
        (tmp_path / str(step)).mkdir()
        done = [_run(*arguments)] if ranks == 1 else run_ranks(ranks, tmp_path / str(step), _run, *arguments)
        assert done == [step] * ranks
    whole, way = (lines(tmp_path / run / "metrics.jsonl") for run in ("whole", "way"))
    assert len(way) == len(WAY)
    for key in ("loss", "grad_norm", "lr"):
        assert [record[key] for record in way] == pytest.approx([record[key] for record in whole], rel=1e-4)
    # Evaluated on every rank where a forward is a collective: the last lines of both epochs, of zero3 and ddp.
    by_step = {record["step"]: record for record in lines(tmp_path / "way" / "epochs.jsonl")}
    for record in lines(tmp_path / "whole" / "epochs.jsonl"):
        assert by_step[record["step"]]["val_rec"] == pytest.approx(record["val_rec"], rel=1e-4)
