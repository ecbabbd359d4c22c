"""Tests of average precision: cases computed by hand, and pycocotools as an oracle."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.detection.average_precision import as_rows, average_precision
from mimae.detection.coco import Coco
from mimae.detection.settings import NAMES
from tests.detection import images

pytest.importorskip("faster_coco_eval", reason="average precision is counted by faster-coco-eval")


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    images.write(tmp_path, 4)
    source = open_source(str(tmp_path / "images"), settings=DataSettings())
    return Coco(str(tmp_path / "instances.json"), "detect.annotations", source)


def rows(coco: Coco, image: int, boxes: list[Any], labels: list[int], scores: list[float]) -> list[dict[str, Any]]:
    found = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}
    size = (coco.objects[image].height, coco.objects[image].width)
    return as_rows(found, coco.image_ids[image], coco.categories, size, size)


def truth(coco: Coco) -> list[dict[str, Any]]:
    """Return detections that equal the annotated objects."""
    return [
        row
        for i, objects in enumerate(coco.objects)
        if len(objects.boxes)
        for row in rows(coco, i, objects.boxes.tolist(), (objects.classes + 1).tolist(), [0.9] * len(objects.boxes))
    ]


def test_what_is_found_exactly_has_precision_1(coco: Coco) -> None:
    found = average_precision(coco, range(4), truth(coco), masks=False).measures
    assert (found["box_ap"], found["box_ap50"], found["box_ap75"]) == (1.0, 1.0, 1.0)
    assert "mask_ap" not in found and "box_ap_large" not in found, "there is no large object"


def test_nothing_found_is_0_and_no_error(coco: Coco) -> None:
    found = average_precision(coco, range(4), [], masks=True).measures
    assert found["box_ap"] == found["mask_ap"] == 0.0


def test_a_false_alarm_above_each_class_halves_precision(coco: Coco) -> None:
    alarms = [
        row for label in (1, 2) for row in rows(coco, 3, [[0, 0, 20, 20]], [label], [0.99])
    ]  # The last image has no object.
    per_class = {1: 3, 2: 3}
    found = average_precision(coco, range(4), truth(coco) + alarms, masks=False).measures
    # After the alarm, precision at the k-th of 3 objects is k / (k + 1), and its maximum to the right is 3 / 4.
    assert per_class[1] / (per_class[1] + 1) == 0.75
    assert found["box_ap50"] == pytest.approx(0.75, abs=1e-9)


def test_one_of_two_found_is_51_of_101_points(tmp_path: Path) -> None:
    images.write(tmp_path, 3)
    tree = json.loads((tmp_path / "instances.json").read_text())
    tree["annotations"] = [each for each in tree["annotations"] if each["category_id"] == 7]
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    source = open_source(str(tmp_path / "images"), settings=DataSettings())
    coco = Coco(str(tmp_path / "instances.json"), "detect.annotations", source)
    assert len(truth(coco)) == 2
    found = average_precision(coco, range(3), truth(coco)[:1], False)
    assert found.measures["box_ap"] == pytest.approx(51 / 101, abs=1e-9)
    assert found.per_class == [pytest.approx(51 / 101, abs=1e-9), None], "no object is a disc"


def test_classes_have_their_own_precision_in_any_order(tmp_path: Path) -> None:
    """COCO's table has the classes in the order of their ids."""
    images.write(tmp_path, 4)
    tree = json.loads((tmp_path / "instances.json").read_text())
    (tmp_path / "instances.json").write_text(json.dumps(tree | {"categories": tree["categories"][::-1]}))
    source = open_source(str(tmp_path / "images"), settings=DataSettings())
    coco = Coco(str(tmp_path / "instances.json"), "detect.annotations", source)
    squares = [row for row in truth(coco) if row["category_id"] == 7]
    assert coco.classes == ["disc", "square"] and average_precision(coco, range(4), squares, False).per_class == [0, 1]


def test_no_image_and_no_object_have_no_measure(coco: Coco) -> None:
    for images_ in ([], [3]):
        assert average_precision(coco, images_, [], True) == ({}, [None, None])


@pytest.mark.parametrize("masks", [True, False])
def test_sizes_are_the_areas_of_the_file(tmp_path: Path, masks: bool) -> None:
    images.write(tmp_path, 4)
    tree = json.loads((tmp_path / "instances.json").read_text())
    for each, area in zip(tree["annotations"], [50_000, 2_000, 3, 0, None, 2_000]):
        each["area"] = area
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    source = open_source(str(tmp_path / "images"), settings=DataSettings())
    coco = Coco(str(tmp_path / "instances.json"), "detect.annotations", source)
    found = average_precision(coco, range(4), [], masks)
    assert {"box_ap_small", "box_ap_medium", "box_ap_large"} <= found.measures.keys()


def test_numbers_are_pycocotools(coco: Coco) -> None:
    """The detections have moved, missing and additional boxes, and shifted masks."""
    tools = pytest.importorskip("pycocotools.coco", reason="pycocotools is the oracle")
    from pycocotools.cocoeval import COCOeval

    generator = np.random.default_rng(0)
    detections = []
    for i, objects in enumerate(coco.objects):
        for box, label in zip(objects.boxes, objects.classes + 1):
            moved = box + generator.normal(0, 2, 4)
            masks = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(i)) * 0.8 + 0.2
            found = {
                "boxes": torch.from_numpy(moved[None]).float().clamp(0),
                "labels": torch.tensor([label if generator.random() < 0.8 else 3 - label]),
                "scores": torch.tensor([generator.random()]).float(),
                "masks": masks,
            }
            size = (objects.height, objects.width)
            detections += as_rows(found, coco.image_ids[i], coco.categories, size, size)
    ours, per_class = average_precision(coco, range(4), detections, masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = tools.COCO(coco.file)
        found_by_them = theirs.loadRes([dict(each) for each in detections])
        for kind, name in (("box", "bbox"), ("mask", "segm")):
            judge = COCOeval(theirs, found_by_them, name)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            for key, value in zip(NAMES, judge.stats[:6]):
                assert ours.get(f"{kind}_{key}", -1.0) == pytest.approx(value, abs=1e-6)
    assert 0 < ours["box_ap"] < 1
    assert np.mean(per_class) == pytest.approx(ours["box_ap"], abs=1e-9)  # type: ignore[arg-type]
