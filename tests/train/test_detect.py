"""Tests of the detection task: it resumes bit for bit, overfits a few images, and reports unusable input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mimae.config.load import load_recipe
from mimae.config.recipe import DetectRecipe
from mimae.data.loading.batch import DataError
from mimae.detection.vitdet import LOSSES, _from_windows, _in_windows, _windows
from mimae.errors import ConfigError, UserError
from mimae.randomness import initialise, materialise
from mimae.train.task import Details
from mimae.train.tasks.detect import Detect
from mimae.train.trainer import train
from tests.detection import images
from tests.rank_processes import run_ranks
from tests.train.recipes import tiny
from tests.train.test_trainer import lines, tensors

pytest.importorskip("faster_coco_eval", reason="average precision is counted by faster-coco-eval")

IMAGES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    images.write(folder, IMAGES)
    return folder


def recipe(folder: Path, run: Path, *overrides: str) -> DetectRecipe:
    annotations = str(folder / "instances.json")
    return tiny(
        DetectRecipe,
        run,
        overrides,
        data={"path": str(folder / "images"), "val_path": str(folder / "images"), "image_size": 32},
        model={"width": 32},
        detect={
            **{"annotations": annotations, "val_annotations": annotations, "window": 3, "global_blocks": 1},
            **{"width": 16, "box_width": 32, "max_objects": 3},
        },
        optimizer={"learning_rate": 0.002, "clip": 1.0},
        schedule={"batch_size": 4, "epochs": 2},
        telemetry={"images_every_epochs": 2},
    )


def test_a_detector_resumes_with_equal_bits_and_draws_what_it_finds(folder: Path, tmp_path: Path) -> None:
    """Take three steps of two images, and stop after the first one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    few = ("schedule.batch_size=2", "schedule.max_steps=3", "telemetry.images_every_epochs=1")
    assert train(Detect(recipe(folder, whole, *few))).finished
    train(Detect(recipe(folder, parts, *few, "run.dry=true", "telemetry.probe_every_epochs=0")))
    assert train(Detect(recipe(folder, parts, *few))).finished
    ends = [tensors(run) for run in (whole, parts)]
    assert len(ends[0]) > 100 and [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    first, _, last = lines(whole / "metrics.jsonl")
    assert all(first[name] > 0 for name in LOSSES) and last == {**lines(parts / "metrics.jsonl")[-1], **_clocks(last)}
    assert 0 <= lines(whole / "epochs.jsonl")[-1]["box_ap"] <= 1
    (picture,) = (whole / "images").glob("*.png")
    with Image.open(picture) as drawn:
        assert drawn.width > 2 * 32 and drawn.height > IMAGES * 32


def _clocks(record: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that depend on the time or on the machine."""
    return {key: record[key] for key in ("images_per_s", "views_per_s", "data_wait", "mem_peak_bytes")}


def test_windows_are_undone_and_pad_with_zeros() -> None:
    tokens = torch.randn(2, 5, 7, 3)
    parts = _in_windows(tokens, 3)
    assert parts.shape == (2 * 2 * 3, 9, 3) and parts.sum() == pytest.approx(tokens.sum().item(), abs=1e-4)
    assert torch.equal(_from_windows(parts, 3, (5, 7)), tokens)
    assert torch.equal(parts[0], tokens[0, :3, :3].flatten(0, 1)), "a window is a square of neighbours"


def test_what_is_found_does_not_depend_on_the_batch_that_a_detector_saw_first(folder: Path, tmp_path: Path) -> None:
    """In training the first batch may hold images that fill a corner of their canvas."""
    found = []
    for first in ([[8, 9]], []):
        model = Detect(recipe(folder, tmp_path, "detect.score=0")).outline()
        materialise(model, "cpu")
        initialise(model.eval(), 0)
        images = torch.randint(0, 256, (1, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        for size in (*first, [32, 32]):
            (last,) = model.detect(images, torch.tensor([size]))
        found.append(last)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("boxes", "scores", "masks"))


def test_new_relative_positions_change_nothing(folder: Path, tmp_path: Path) -> None:
    maps = []
    for relative in ("true", "false"):
        task = Detect(recipe(folder, tmp_path, f"detect.relative_positions={relative}"))
        model = task.outline()
        materialise(model, "cpu")
        initialise(model, 0)
        tokens = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        maps.append(model.maps(tokens))
    assert sorted(maps[0]) == ["0", "1", "2", "3", "pool"]
    assert [tuple(each.shape[2:]) for each in maps[0].values()] == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    for name, one in maps[0].items():
        assert torch.allclose(one, maps[1][name], atol=1e-5)


def test_scaled_decoding_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.decode = scaled .* is for pretraining and classification"):
        recipe(folder, tmp_path, "data.decode=scaled")


def test_strides_are_whole_pixels(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.patch_size = 14 .* legal is a multiple of 4"):
        recipe(folder, tmp_path, "model.patch_size=14", "data.image_size=28")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["detect.annotations=null"], "detect.annotations=null: it has to name the COCO file"),
        (["detect.val_annotations=null"], "needs detect.val_annotations"),
        (["data.loader=dali_cpu"], "makes images alone"),
    ],
)
def test_what_is_missing_is_said(folder: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        train(Detect(recipe(folder, tmp_path, *overrides)))


def test_objects_without_masks_are_said(folder: Path, tmp_path: Path) -> None:
    text = (folder / "instances.json").read_text().replace('"segmentation"', '"other"')
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(UserError, match=r"objects without a mask: legal are detect.masks=false, or detect.panoptic"):
        train(Detect(recipe(folder, tmp_path / "run", f"detect.annotations={tmp_path}/boxes.json")))


def test_images_that_an_evaluation_left_out_are_said_once(folder: Path, tmp_path: Path) -> None:
    task = Detect(recipe(folder, tmp_path))
    model = task.outline()
    task.found = Details(1_000, 3, "box_ap", {})
    assert task.warning(model, 1, 2, 2) == "in data.val_path 3 of 1,003 images could not be used"
    task.stepped(model, {}, torch.zeros(()))
    assert task.warning(model, 2, 2, 2) is None


def test_a_validation_file_without_masks_is_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "instances.json").read_text())
    del tree["annotations"][-1]["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(tree))
    task = Detect(recipe(folder, tmp_path / "run", f"detect.val_annotations={tmp_path}/boxes.json"))
    with pytest.raises(DataError, match=r"detect.val_annotations=.* objects without a mask: .*detect.val_panoptic"):
        task.check()


def test_outputs_have_different_names(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "instances.json").read_text())
    for category in tree["categories"]:
        category["name"] = "thing"
    (tmp_path / "equal.json").write_text(json.dumps(tree))
    task = Detect(recipe(folder, tmp_path / "run", f"detect.annotations={tmp_path}/equal.json"))
    assert task.outputs() == task.coco.classes == ["thing (7)", "thing (30)"]


def _trained(folder: Path, run: Path, overrides: list[str]) -> float:
    train(Detect(recipe(folder, run, *overrides)))
    return float(lines(run / "metrics.jsonl")[-1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2"])
def test_engines_train_it_on_two_ranks(folder: Path, tmp_path: Path, kind: str) -> None:
    losses = run_ranks(
        2, tmp_path, _trained, folder, tmp_path / "run", [f"engine.kind={kind}", "schedule.accumulate=1"]
    )
    assert losses[0] < 6


@pytest.mark.slow
def test_a_few_images_are_learnt_by_heart(folder: Path, tmp_path: Path) -> None:
    overrides = ["schedule.epochs=120", "detect.scale=[1, 1]", "data.flip=false", "finetune.drop_path=0"]
    overrides += ["finetune.layer_decay=1"]  # The weights are random, so all layers have to learn.
    overrides += ["detect.width=32", "detect.box_width=64", "schedule.accumulate=1", "data.image_size=48"]
    overrides += ["telemetry.probe_every_epochs=120", "telemetry.images_every_epochs=120", "model.width=48"]
    assert train(Detect(recipe(folder, tmp_path, *overrides))).finished
    end = lines(tmp_path / "epochs.jsonl")[-1]
    assert end["box_ap50"] > 0.8 and end["mask_ap50"] > 0.5, end


def test_the_shipped_recipe_is_vitdets() -> None:
    """Compare with the published recipe, which counts steps with batches of 64 of 118,287 images."""
    found, per_epoch = load_recipe("detect_coco_vit_base", (), None, DetectRecipe).recipe, 118_287 // 64
    schedule = found.schedule
    assert (schedule.batch_size, schedule.epochs, schedule.drop_factor) == (64, 100, 0.1)
    assert [round(epoch * per_epoch) for epoch in schedule.drop_epochs] == pytest.approx([163_889, 177_546], abs=20)
    assert round(schedule.warmup_epochs * per_epoch) == 250
    assert (found.optimizer.learning_rate, found.optimizer.weight_decay, found.optimizer.betas) == (
        1e-4,
        0.1,
        (0.9, 0.999),
    )
    assert (found.finetune.layer_decay, found.finetune.drop_path, found.data.image_size) == (0.7, 0.1, 1024)
    assert _windows(12, found.detect) == [14, 14, 0] * 4
