"""`mimae plan` of recipes that fine-tune: FLOPs against pretraining's count, memory, and what is not foreseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mimae.cli import app
from mimae.config.load import load_recipe
from mimae.config.recipe import ClassifyRecipe, DetectRecipe, RunRecipe, SegmentRecipe
from mimae.errors import UserError
from mimae.evaluate.classes import Classes
from mimae.plan.cost import Fleet
from mimae.plan.gpus import find_gpu
from mimae.tools.plan import NOT_COUNTED, document, report
from mimae.train.tasks.classify import Classify
from mimae.train.tasks.detect import Detect
from tests.detection import images

FLEET = Fleet(find_gpu("a100"), 8, 8, 0.5)
VIT_BASE = 35.13e9
"""FLOPs of a forward of ViT-B at 224 px with a head of 1,000 classes: timm's 17.58 GMAC, two for each."""


@pytest.mark.parametrize(("freeze", "forwards"), [("none", 3), ("6", 2), ("all", 1)])
def test_what_is_not_trained_has_no_backward(freeze: str, forwards: int) -> None:
    """A frozen half has a forward only; a forward's backward costs two."""
    asked = load_recipe("finetune_vit_base", [f"finetune.freeze={freeze}"], None, ClassifyRecipe).recipe
    task = Classify(asked)
    task.classes = Classes(None, list(range(1000)))
    assert task.flops(asked.data.size_hw) == pytest.approx(forwards * VIT_BASE, rel=0.02)


@pytest.mark.slow  # the heads are traced at 1,024 px
def test_a_detector_counts_its_heads(tmp_path: Path) -> None:
    """At 1,024 px the encoder alone takes 3 x 2 x 85 M products for each of 4,096 patches, and attention."""
    images.write(tmp_path, 2)
    overrides = [f"data.path={tmp_path / 'images'}", f"detect.annotations={tmp_path / 'instances.json'}"]
    asked = load_recipe("detect_coco_vit_base", overrides, None, DetectRecipe).recipe
    counted = Detect(asked).flops(asked.data.size_hw)
    assert counted is not None and 6 * 85e6 * 4096 < counted < 3 * 6 * 85e6 * 4096
    found = document(asked, FLEET, 118_287)
    assert found["engines"] == {} and found["flops_per_image"] == counted
    assert NOT_COUNTED in report(found, FLEET) and found["steps"] == 100 * (118_287 // 64)


def test_a_plan_says_what_a_gpu_holds() -> None:
    overrides = ["segment.classes=4", "schedule.batch_size=16", "finetune.freeze=2"]
    asked = load_recipe("segment_small", overrides, None, SegmentRecipe).recipe
    found = document(asked, FLEET, 1600)
    spread, whole = found["engines"]["fsdp"], found["engines"]["ddp"]
    assert whole["weights"] == 4 * found["parameters"] and whole["gradients"] == 4 * found["trained"]
    assert found["trained"] < found["parameters"] and found["images_per_micro_batch"] == 2
    # The first rank has the rows that cannot be dealt evenly, as positions, which are one row.
    assert 1 / 8 < spread["weights"] / whole["weights"] < 1 / 4
    assert 1 / 8 < spread["optimizer"] / whole["optimizer"] < 1 / 4
    assert 0 < spread["activations"] < spread["peak"] < whole["peak"]
    # The recipe is in fp32, in which an A100 has 19.5 TFLOP/s.
    assert found["seconds"] == pytest.approx(found["flops_per_image"] * 16 / (8 * 19.5e12 * 0.5))
    said = report(found, FLEET)
    assert "task=segment: " in said and "2 a GPU and micro-batch" in said and "fits" in said


def test_the_verb_takes_recipes_of_every_task() -> None:
    arguments = ["plan", "segment_small", "--gpus", "1", "segment.classes=3", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.output)["task"] == "segment"
    with pytest.raises(UserError, match="--dry-run is for pretraining"):
        CliRunner().invoke(app, [*arguments[:-1], "--dry-run"], catch_exceptions=False)
    with pytest.raises(UserError, match="must be divisible by 7"):
        document(load_recipe("segment_small", [], None, RunRecipe).recipe, FLEET._replace(gpus=7), 1600)
