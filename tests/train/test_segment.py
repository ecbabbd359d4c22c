"""Tests of segmentation: the numbers of the published recipe, and whole runs from images and masks to measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimae import distributed
from mimae.config.load import load_recipe
from mimae.config.recipe import SegmentRecipe
from mimae.data.loading.batch import DataError
from mimae.errors import ConfigError
from mimae.optim.schedule import schedule_factor, total_steps
from mimae.segmentation.examples import BRIGHTNESS, CONTRAST, HUE, SATURATION, TRIES
from mimae.segmentation.heads import AUXILIARY_WIDTH, POOLS
from mimae.segmentation.measures import Evaluation
from mimae.train.tasks.segment import Segment
from mimae.train.trainer import train
from tests.rank_processes import run_ranks
from tests.train.recipes import tiny
from tests.train.test_trainer import lines, tensors

STEPS = 4


def scene(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image uint8 (36, 48, 3) and its classes uint8 (36, 48).

    The image has a disc and a bar on a background, each with its own colour and noise. One column of pixels is ignored.
    """
    generator = np.random.default_rng(i)
    rows, columns = np.mgrid[:36, :48]
    classes = np.zeros((36, 48), np.uint8)
    classes[(rows - generator.integers(8, 28)) ** 2 + (columns - generator.integers(8, 40)) ** 2 < 64] = 1
    left = generator.integers(0, 40)
    classes[:, left : left + 8] = 2
    colour = np.array([(90, 120, 60), (180, 60, 60), (60, 70, 190)])[classes]
    image = np.clip(colour + generator.normal(0, 30, colour.shape), 0, 255).astype(np.uint8)
    classes[:, -1] = 255
    return image, classes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 9 pairs in ADE20K's layout; 9 is odd, so that two ranks have unequal shares."""
    folder = tmp_path_factory.mktemp("scenes")
    for i in range(9):
        for name, pixels in zip(("images", "annotations"), scene(i)):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def recipe(scenes: Path, run: Path, *overrides: str) -> SegmentRecipe:
    return tiny(
        SegmentRecipe,
        run,
        overrides,
        data={"path": str(scenes / "images"), "val_path": str(scenes / "images"), "image_size": 16},
        model={"depth": 4},
        segment={"classes": ["ground", "disc", "bar", "none"], "head": "upernet", "width": 16},
        optimizer={"learning_rate": 3e-3, "clip": 1.0},
        schedule={"batch_size": 4, "epochs": 2, "shape": "constant"},
        telemetry={"images_every_epochs": 2},
    )


def test_the_recipe_for_ade20k_has_the_published_numbers() -> None:
    """Compare with mmsegmentation's configs/mae and its UperNet: settings, learning rates of groups, schedule."""
    found = load_recipe("segment_ade20k_vit_base", (), None, SegmentRecipe).recipe
    task, schedule = Segment(found), found.schedule
    optimizer, settings = found.optimizer, found.segment
    assert (optimizer.kind, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (
        "adamw",
        (0.9, 0.999),
        0.05,
        None,
    )
    assert (task.peak, schedule.batch_size, found.data.size_hw, found.data.flip) == (1e-4, 16, (512, 512), True)
    per_epoch = 20_210 // 16
    assert total_steps(schedule, per_epoch) == 160_000
    factors = [schedule_factor(schedule, step, per_epoch, task.peak) for step in (0, 1499, 1500, 80_750, 159_999)]
    assert factors == pytest.approx([1 / 1500, 1, 1, 0.5, 0], abs=1e-4)
    assert settings.maps(12) == (3, 5, 7, 11) and settings.head == "upernet" and settings.width == 768
    assert (settings.auxiliary, settings.dropout, POOLS, AUXILIARY_WIDTH) == (0.4, 0.1, (1, 2, 3, 6), 256)
    assert (settings.scale, settings.max_class_share, TRIES - 1, settings.stride) == ((0.5, 2.0), 0.75, 10, 0.5)
    assert settings.photometric and settings.relative_positions
    assert (BRIGHTNESS, CONTRAST, SATURATION, HUE) == (32 / 255, (0.5, 1.5), (0.5, 1.5), 18 / 180)
    assert settings.number == 150 and settings.values()[0] == (1,) and settings.ignore == (0, 255)
    assert (found.finetune.layer_decay, found.finetune.drop_path) == (0.65, 0.1)
    groups = {name: task.group(name, p.shape) for name, p in task.outline().named_parameters()}
    for name in ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight"):
        assert groups[name].peak == pytest.approx(0.003697e-4, rel=1e-3)
    assert groups["encoder.blocks.11.attn.qkv.weight"].peak == pytest.approx(0.65e-4)
    heads = {group.peak for name, group in groups.items() if not name.startswith("encoder.")}
    assert heads == {1e-4}
    assert groups["head.fused.0.weight"].weight_decay == 0.05 and groups["head.fused.1.weight"].weight_decay == 0


def test_a_run_has_its_measures_its_classes_and_a_picture(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Include a class `none` that is in no mask: its measure is missing, or 0 if it was predicted; the run tells it."""
    assert train(Segment(recipe(scenes, tmp_path / "run", "schedule.max_steps=3", "precision=bf16"))).finished
    step, epoch = lines(tmp_path / "run" / "metrics.jsonl")[-1], lines(tmp_path / "run" / "epochs.jsonl")[-1]
    assert step["loss"] == pytest.approx(step["main"] + step["auxiliary"], rel=1e-5)
    values = [epoch[f"iou_{name}"] for name in ("ground", "disc", "bar", "none")]
    assert not values[3] and 0 <= epoch["pixel_accuracy"] <= 1
    counted = [value for value in values if value is not None]
    assert epoch["miou"] == pytest.approx(sum(counted) / len(counted))
    assert "in data.val_path no pixel has the class none" in capsys.readouterr().out
    (picture,) = (tmp_path / "run" / "images").iterdir()
    # There are three panels of 16 pixels, enlarged to 128.
    assert Image.open(picture).width > 3 * 128


def test_masks_that_cannot_be_used_stop_the_run_with_their_number(scenes: Path, tmp_path: Path) -> None:
    overrides = ["segment.classes=2", "data.val_path=null"]
    with pytest.raises(
        DataError, match=r"(?s)its mask .*annotations/.*pixels have values that are no class: 2; legal are 0 to 1"
    ):
        train(Segment(recipe(scenes, tmp_path, *overrides)))


def test_evaluation_leaves_out_what_cannot_be_read_and_says_so(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held-out"
    for i in range(3):
        image, classes = scene(i)
        for name, pixels in (("images", image), ("annotations", classes[:, : 48 - i])):
            (held_out / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(held_out / name / f"{i}.png")
    overrides = [f"data.val_path={held_out / 'images'}", "schedule.max_steps=1"]
    task = Segment(recipe(scenes, tmp_path / "run", *overrides))
    train(task)
    assert "in data.val_path 2 of 3 images could not be used" in capsys.readouterr().out


def test_an_evaluation_stays_until_the_next_step(scenes: Path, tmp_path: Path) -> None:
    task = Segment(recipe(scenes, tmp_path))
    model, table = task.outline(), torch.zeros(4, 4, dtype=torch.int64)
    table[:3, 0] = 1
    for left_out, said in ((0, None), (2, "in data.val_path 2 of 3 images could not be used")):
        task.found = Evaluation(table, 1, left_out)
        absent = f"{said}; no pixel" if said else "in data.val_path no pixel"
        assert task.warning(model, 1, 2, 2) == said
        assert task.warning(model, 2, 2, 2) == f"{absent} has the class none"
        details = task.details()
        assert details is not None and details.left_out == left_out
    task.stepped(model, {}, torch.zeros(()))
    assert task.warning(model, 2, 2, 2) is None and task.details() is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("segment.blocks=[0,1,2,2]", "the last number has to be that of the encoder's last block, 3"),
        ("data.crop_scale=[0.5,1.0]", "windows are cut by segment.scale"),
        ("segment.classes=[a]", "at least 2 names"),
        ("segment.head=fcn", "upernet or linear"),
        ("data.decode=scaled", "data.decode = scaled .* is for pretraining and classification; legal here is exact"),
        ("evaluation.crop=0.875", "is for classifiers; task=segment is evaluated on whole images; legal is 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, tmp_path, override)


AT_THE_END = "telemetry.probe_every_epochs=2"
"""Override with which a run is evaluated only once, since evaluation takes most of its time."""


def whole_and_resumed(scenes: Path, runs: Path, ways: dict[str, list[str]]) -> dict[str, Any]:
    """Compare a whole run with one that stopped within an epoch, for each entry of `ways`.

    Returns losses, measures and the names of tensors that differ.
    """
    leave, distributed.shutdown = (
        distributed.shutdown,
        lambda: None,
    )  # DeepSpeed needs its process group until the end
    found = {}
    try:
        for way, overrides in ways.items():
            whole, parts = runs / way / "whole", runs / way / "parts"
            assert train(Segment(recipe(scenes, whole, AT_THE_END, *overrides))).finished
            train(Segment(recipe(scenes, parts, "telemetry.probe_every_epochs=0", *overrides, "run.dry=true")))
            assert train(Segment(recipe(scenes, parts, AT_THE_END, *overrides))) == (parts, STEPS, True, False)
            ends = [tensors(run) for run in (whole, parts)]
            found[way] = {
                "different": [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])],
                "tensors": len(ends[0]),
                "losses": [[record["loss"] for record in lines(run / "metrics.jsonl")] for run in (whole, parts)],
                "miou": [[record["miou"] for record in lines(run / "epochs.jsonl")][-1] for run in (whole, parts)],
            }
    finally:
        distributed.shutdown = leave
    return found


def check(found: dict[str, Any], losses: list[float], miou: float) -> None:
    """Compare with the losses and the measure of one rank."""
    assert not found["different"] and found["tensors"] > 100
    whole, parts = found["losses"]
    assert whole == parts and len(whole) == STEPS and found["miou"][0] == found["miou"][1]
    # The order of summation differs; the largest measured difference is 3e-6.
    assert whole == pytest.approx(losses, rel=1e-4)
    # A pixel may change its class where rounding decides between the two best classes.
    assert found["miou"][0] == pytest.approx(miou, abs=2e-3)


def alone(scenes: Path, run: Path) -> tuple[list[float], float]:
    assert train(Segment(recipe(scenes, run, AT_THE_END))).finished
    return [record["loss"] for record in lines(run / "metrics.jsonl")], lines(run / "epochs.jsonl")[-1]["miou"]


@pytest.mark.slow
def test_two_ranks_train_as_one_and_resume_with_equal_bits(scenes: Path, tmp_path: Path) -> None:
    """Evaluate 9 images with FSDP, which is a collective, on two ranks; each image has 3 to 6 windows."""
    expected = alone(scenes, tmp_path / "alone")
    for rank in run_ranks(2, tmp_path, whole_and_resumed, scenes, tmp_path, {"fsdp": ["engine.kind=fsdp"]}):
        check(rank["fsdp"], *expected)


@pytest.mark.slow
def test_every_engine_trains_as_one_rank_does(scenes: Path, tmp_path: Path) -> None:
    ways = {kind: [f"engine.kind={kind}"] for kind in ("ddp", "fsdp", "zero2")}
    expected = alone(scenes, tmp_path / "alone")
    found = run_ranks(2, tmp_path, whole_and_resumed, scenes, tmp_path, ways)[0]
    for way in ways:
        check(found[way], *expected)


@pytest.mark.slow
def test_a_few_images_are_learned_by_heart(scenes: Path, tmp_path: Path) -> None:
    """Train from random weights. Predicting only background gives a mean intersection over union of 0.24."""
    overrides = [
        *("schedule.epochs=150", "telemetry.probe_every_epochs=150", "segment.classes=3", "finetune.drop_path=0"),
        *("segment.photometric=false", "finetune.layer_decay=1", "schedule.accumulate=1"),
    ]
    assert train(Segment(recipe(scenes, tmp_path, *overrides))).finished
    assert lines(tmp_path / "epochs.jsonl")[-1]["miou"] > 0.7
