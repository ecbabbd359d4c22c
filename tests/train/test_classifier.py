"""Tests that the trainer accepts any task: a short classifier trains with the engines and resumes bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae import distributed
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe, RunRecipe
from mimae.data.loading.batch import Batch
from mimae.evaluate import share
from mimae.model.encoder import Encoder
from mimae.model.units import Model
from mimae.optim.groups import Group, is_matrix
from mimae.train.task import Result, Task
from mimae.train.trainer import train
from tests.image_folders import two_classes
from tests.rank_processes import run_ranks
from tests.train.test_trainer import lines, tensors

STEPS = 9


class Classifier(Model):
    """Encoder with a linear layer."""

    evaluations = ("logits",)

    def __init__(self, recipe: RunRecipe) -> None:
        super().__init__()
        self.encoder = Encoder(recipe.model, recipe.data.size_hw, recipe.data.mean, recipe.data.std)
        self.head = nn.Linear(recipe.model.width, 2)

    def units(self) -> Sequence[nn.Module]:
        return tuple(self.encoder.blocks)

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.encoder.features(images))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images), labels)


class Classify(Task[Classifier]):
    measures = {"accuracy": "max"}  # noqa: RUF012

    def outline(self) -> Classifier:
        with torch.device("meta"):
            return Classifier(self.recipe)

    def group(self, name: str, shape: torch.Size) -> Group:
        return Group(self.peak, 0.1 if is_matrix(name, shape) else 0.0)

    def labels(self, batch: Batch) -> Tensor:
        return torch.as_tensor(self.source.labels)[batch.source_ids]

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images, self.labels(batch)

    def result(self, output: Tensor) -> Result:
        return Result(output, {"loss": distributed.all_sum(output) / distributed.world_size()})

    def evaluate(self, model: Classifier, device: torch.device) -> dict[str, float]:
        ids, right = torch.arange(len(self.source)), torch.zeros(())
        for batch, count in share.batches(self.recipe.data, self.source, ids, device, 8):
            right += (model.logits(batch.images).argmax(1) == self.labels(batch))[:count].sum()
        return {"accuracy": distributed.all_sum(right).item() / len(ids)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 25 dark images and 25 bright ones: 3 steps of 16 per epoch."""
    generator = np.random.default_rng(0)
    images = (generator.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * (i % 2)) for i in range(50))
    return two_classes(tmp_path_factory.mktemp("images"), images)


def recipe(images: Path, run: Path, *overrides: str) -> Recipe:
    tree = {
        "precision": "fp32",
        "run": {"dir": str(run)},
        "data": {"path": str(images), "image_size": 8, "workers": 0, "loader": "torch"},
        "model": {"size": "tiny", "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "attention": "sdpa"},
        "optimizer": {"learning_rate": 0.01, "scale_by": "none", "betas": [0.9, 0.999], "clip": 1.0},
        "schedule": {"batch_size": 16, "epochs": 3, "warmup_epochs": 0, "accumulate": 2, "shape": "constant"},
        "ema": {"decay": 0.5},
        "telemetry": {"log_every_steps": 1, "probe_every_epochs": 1, "tensorboard": False},
    }
    return load_recipe(tree, overrides).recipe


def whole_and_resumed(images: Path, runs: Path, ways: dict[str, list[str]]) -> dict[str, Any]:
    """Compare a whole run with one that stopped twice, for each entry of `ways`.

    Returns losses, accuracies and the names of tensors that differ.
    """
    leave, distributed.shutdown = (
        distributed.shutdown,
        lambda: None,
    )  # DeepSpeed needs its process group until the end
    found = {}
    try:
        for way, overrides in ways.items():
            whole, parts = runs / way / "whole", runs / way / "parts"
            assert train(Classify(recipe(images, whole, *overrides))).finished
            for _ in range(2):
                train(Classify(recipe(images, parts, *overrides, "run.dry=true")))
            assert train(Classify(recipe(images, parts, *overrides))) == (parts, STEPS, True, False)
            ends = [tensors(run) for run in (whole, parts)]
            found[way] = {
                "different": [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])],
                "tensors": len(ends[0]),
                "losses": [[record["loss"] for record in lines(run / "metrics.jsonl")] for run in (whole, parts)],
                "accuracy": [record["accuracy"] for record in lines(whole / "epochs.jsonl")],
            }
    finally:
        distributed.shutdown = leave
    return found


def check(found: dict[str, Any]) -> None:
    assert not found["different"] and found["tensors"] > 50
    whole, parts = found["losses"]
    assert whole == parts and len(whole) == STEPS
    assert whole[-1] < whole[0] / 2 and found["accuracy"][-1] == 1.0, "it learns"


def test_a_classifier_trains_and_resumes_on_two_ranks(images: Path, tmp_path: Path) -> None:
    ways = {"fsdp": ["engine.kind=fsdp"]}
    for rank in run_ranks(2, tmp_path, whole_and_resumed, images, tmp_path, ways):
        check(rank["fsdp"])


WAYS = {
    f"{kind}, compile={setting}": [f"engine.kind={kind}", f"compile={setting}"]
    for kind in ("ddp", "fsdp", "zero2")
    for setting in ("off", "on")
}


@pytest.mark.slow
def test_every_engine_trains_a_classifier_compiled_and_not(images: Path, tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path, whole_and_resumed, images, tmp_path, WAYS)[0]
    for way in WAYS:
        check(found[way])
        assert found[way]["losses"][0] == pytest.approx(found["ddp, compile=off"]["losses"][0], rel=1e-4)


def test_a_run_has_the_columns_of_its_task_and_no_others(images: Path, tmp_path: Path) -> None:
    assert train(Classify(recipe(images, tmp_path, "schedule.max_steps=3"))).finished
    step, epoch = lines(tmp_path / "metrics.jsonl")[-1], lines(tmp_path / "epochs.jsonl")[-1]
    assert step["loss"] > 0 and not {"rec", "max_mi", "gate"} & step.keys()
    assert epoch["accuracy"] <= 1 and not {"rec", "knn", "val_rec"} & epoch.keys()
    assert epoch["loss"] == pytest.approx(np.mean([record["loss"] for record in lines(tmp_path / "metrics.jsonl")]))
