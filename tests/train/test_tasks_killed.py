"""A run of each task that is killed at the worst moment goes on to the bits of one that was not.

The worst moment is the end of a save, when all tensors of the newest checkpoint are written and it has no name yet: the
run is in the middle of an epoch, and goes on from the checkpoint before.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mimae.checkpoints import checkpoint
from mimae.config.recipe import RunRecipe
from mimae.train.tasks.registry import make_task
from mimae.train.trainer import train
from tests.detection import images as objects
from tests.rank_processes import own_process
from tests.train import test_classify, test_detect, test_segment
from tests.train.test_classify import LINEAR, images  # noqa: F401
from tests.train.test_segment import scenes  # noqa: F401
from tests.train.test_trainer import lines, tensors

OFTEN = ["checkpoint.every_steps=1", "checkpoint.background=false", "schedule.max_steps=4", "data.loader=torch"]
"""Four steps, with a checkpoint after each."""


def killed(asked: RunRecipe, at: int) -> None:
    """Train until the save of step `at` has only to be named."""
    commit = checkpoint.commit

    def kill_or_commit(temporary: Path, *rest: object) -> None:
        if temporary == checkpoint.unfinished(temporary.parents[1], at):
            os.kill(os.getpid(), signal.SIGKILL)
        commit(temporary, *rest)  # type: ignore[arg-type]

    checkpoint.commit = kill_or_commit  # type: ignore[assignment]
    torch.set_num_threads(1)
    train(make_task(asked))


def check(make: Callable[[Path], RunRecipe], folder: Path) -> None:
    whole, parts = folder / "whole", folder / "parts"
    assert train(make_task(make(whole))).finished
    process = own_process(killed, make(parts), 3)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.names(parts)[0] == "step-00000002", "the save of step 3 has no name"
    assert train(make_task(make(parts))).finished
    ends = [tensors(run) for run in (whole, parts)]
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    whole_losses, losses = ([record["loss"] for record in lines(run / "metrics.jsonl")] for run in (whole, parts))
    assert losses == whole_losses


def test_a_classifier_is_killed(images: Path, tmp_path: Path) -> None:  # noqa: F811
    """With every augmentation, drop path, layer decay, EMA and two micro-batches."""
    check(lambda run: test_classify.recipe(images, run, *OFTEN), tmp_path)


@pytest.mark.slow
def test_a_linear_classifier_is_killed(images: Path, tmp_path: Path) -> None:  # noqa: F811
    check(lambda run: test_classify.recipe(images, run, *LINEAR, *OFTEN), tmp_path)


@pytest.mark.slow
def test_a_segmenter_is_killed(scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    check(lambda run: test_segment.recipe(scenes, run, *OFTEN, "segment.relative_positions=true"), tmp_path)


@pytest.mark.slow
def test_a_detector_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is counted by faster-coco-eval")
    objects.write(tmp_path / "coco", 8)
    check(lambda run: test_detect.recipe(tmp_path / "coco", run, *OFTEN), tmp_path)
