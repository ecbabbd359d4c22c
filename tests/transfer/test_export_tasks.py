"""`mimae export` of fine-tuned models: what others compute with them is what the model computes here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mimae.config.load import load_recipe
from mimae.config.recipe import ClassifyRecipe
from mimae.errors import UserError
from mimae.model.portable import Form
from mimae.train.tasks.detect import Detect
from mimae.train.tasks.registry import make_task
from mimae.train.tasks.segment import Segment
from mimae.train.trainer import train
from mimae.transfer.export import export
from mimae.transfer.targets.base import Options
from tests.train import test_detect, test_segment
from tests.train.test_segment import scenes  # noqa: F401
from tests.transfer.conftest import TINY
from tests.transfer.test_export import ISOLATED

GRAPHS = ["torch"] + ["onnx"] * all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))

CLASSIFIERS = {
    "mean": ["head.norm=fc_norm", "head.pooling=mean", "evaluation.crop=0.875"],
    "linear": ["head.norm=batch_norm", "head.pooling=class_token", "finetune.freeze=all"],
}
"""MAE's fine-tuning, and its linear probing, whose batch norm has moments after a step."""


@pytest.fixture(scope="module")
def classifiers(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that trains a classifier for a step, whose logits are large enough to differ, and returns its run."""
    made = dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            shared = {key: TINY[key] for key in ("precision", "model", "schedule", "telemetry", "checkpoint")}
            data = {**TINY["data"], "path": str(images), "max_bad_fraction": 1}
            overrides = [f"run.dir={made[kind]}", "run.dry=true", "head.init_std=1", *CLASSIFIERS[kind]]
            tree = {"task": "classify", **shared, "data": data}
            train(make_task(load_recipe(tree, overrides, None, ClassifyRecipe).recipe))
        return made[kind]

    return make


@pytest.fixture(scope="module")
def segmenter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """UperNet with relative positions."""
    place = tmp_path_factory.mktemp("segmenter")
    train(Segment(test_segment.recipe(scenes, place, "run.dry=true", "segment.relative_positions=true")))
    return place


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_is_timms(classifiers: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    report = export(classifiers(kind), "timm", out, Options())
    assert report.differences is not None and list(report.differences) == ["logits"]
    assert report.differences["logits"] < 1e-5
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.num_classes == 2 and model(torch.zeros(1, 3, 8, 12)).shape == (1, 2)
    assert model.global_pool == {"mean": "avg", "linear": "token"}[kind]
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == ["a", "b"] and config["num_classes"] == 2
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == (0.875 if kind == "mean" else 1.0)
    card = (out / "README.md").read_text()
    assert "A classifier of images in 2 classes" in card and "- image-classification" in card and "| a, b |" in card


def test_what_a_fine_tuned_model_cannot_be_is_said(classifiers: Callable[[str], Path], tmp_path: Path) -> None:
    run = classifiers("mean")
    for to, options, said in (
        ("transformers", Options(), "--to transformers holds pretrained encoders; a run of task=classify goes to timm"),
        ("mae", Options(decoder=True), "holds pretrained encoders"),
        ("torch", Options(form=Form(dynamic_size=True)), "--dynamic-size is for pretrained encoders; .* 8 x 12 pixels"),
    ):
        with pytest.raises(UserError, match=said):
            export(run, to, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_there_is_no_graph_of_a_detector(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is counted by faster-coco-eval")
    from tests.detection import images

    images.write(tmp_path / "coco", 4)
    asked = test_detect.recipe(tmp_path / "coco", tmp_path / "run", "run.dry=true", "telemetry.probe_every_epochs=0")
    train(Detect(asked))
    for to in ("torch", "onnx", "timm"):
        with pytest.raises(UserError, match=r"torch\.export cannot follow a detector: how torchvision's batched_nms"):
            export(tmp_path / "run", to, tmp_path / "out", Options())


@pytest.mark.slow
@pytest.mark.parametrize("to", GRAPHS)
@pytest.mark.parametrize("form", [Form(), Form("float")])
def test_graphs_of_heads_compute_by_themselves(
    classifiers: Callable[[str], Path], segmenter: Path, tmp_path: Path, to: str, form: Form
) -> None:
    """Any batch, without mimae."""
    for name, run in (("linear", classifiers("linear")), ("mean", classifiers("mean")), ("segmenter", segmenter)):
        out = tmp_path / name
        report = export(run, to, out, Options(form=form))
        assert report.differences is not None and list(report.differences) == ["logits"]
        assert report.differences["logits"] < 1e-5
        done = subprocess.run(
            [sys.executable, "-c", ISOLATED, str(out / "check.py")], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "logits: differs by" in done.stdout, done.stderr
