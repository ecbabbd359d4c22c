"""Tests of annotations and examples: all forms of masks, one geometry for pixels, boxes and masks, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

from mimae.data.loading.batch import DataError
from mimae.data.loading.loader import make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.detection.coco import Coco
from mimae.detection.examples import DetectionReader, unpacked
from mimae.detection.settings import DetectSettings
from tests.detection import images

pytest.importorskip("faster_coco_eval", reason="masks are drawn by faster-coco-eval")

DATA = DataSettings(image_size=(48, 40), workers=0, flip=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images.write(tmp_path, 5)
    return tmp_path


def coco(folder: Path, **changed: Any) -> Coco:
    tree = json.loads((folder / "instances.json").read_text()) | changed
    (folder / "changed.json").write_text(json.dumps(tree))
    return Coco(str(folder / "changed.json"), "detect.annotations", source(folder), None)


def source(folder: Path) -> Any:
    return open_source(str(folder / "images"), settings=DATA)


def test_polygons_rle_and_panoptic_segments_give_the_same_masks(folder: Path) -> None:
    drawn = coco(folder)
    panoptic = Coco(drawn.file, "detect.annotations", source(folder), str(folder / "panoptic"))
    assert drawn.has_masks() and [len(each.boxes) for each in drawn.objects] == [2, 2, 2, 2, 0]
    for i in range(5):
        which = np.arange(len(drawn.objects[i].boxes))
        masks = drawn.masks(i, which)
        assert np.array_equal(masks, panoptic.masks(i, which))
        for mask, (left, top, right, bottom) in zip(masks, drawn.objects[i].boxes.astype(int)):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 100
    assert drawn.classes == ["square", "disc"] and drawn.image_ids == [100, 103, 106, 109, 112]


def test_boxes_follow_their_masks_and_masks_their_pixels(folder: Path) -> None:
    """Objects are brighter than the background, so pixels show their position after scaling, cutting and flipping."""
    loader = make_loader(
        DATA, source(folder), seed=4, batch_size=5, reader=DetectionReader(coco(folder), DATA, DetectSettings(), 4)
    )
    seen = set()
    for epoch in range(8):
        (batch,) = loader.epoch(epoch)
        for i in range(5):
            target = {name: value[i] for name, value in batch.targets.items()}
            count, (height, width) = int(target["count"]), target["size"].tolist()
            masks = unpacked(target["masks"], 40)[:count].bool()
            bright = batch.images[i].amax(-1) > 130
            # Scaling blurs edges, but not pixels further inside or outside.
            every = masks.any(0).float()[None]
            inside, around = -max_pool2d(-every, 3, 1, 1)[0] == 1, max_pool2d(every, 3, 1, 1)[0] == 1
            assert bright[inside].all() and not bright[~around].any()
            assert not masks[:, height:].any() and not masks[:, :, width:].any()
            for mask, (left, top, right, bottom) in zip(masks, target["boxes"][:count].int().tolist()):
                assert mask[top:bottom, left:right].sum() == mask.sum() > 0
                assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
            seen.add(count)
    assert {0, 2} <= seen, "some are cut away, some stay"


def test_a_resumed_epoch_has_the_same_examples(folder: Path) -> None:
    reader = DetectionReader(coco(folder), DATA, DetectSettings(), 4)
    loader = make_loader(DATA, source(folder), seed=4, batch_size=1, reader=reader)
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, first_step=2))
    for one, other in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_crowds_and_boxes_outside_are_left_out(folder: Path) -> None:
    tree = json.loads((folder / "instances.json").read_text())
    tree["annotations"][0]["iscrowd"] = 1
    tree["annotations"][1]["bbox"] = [500, 500, 10, 10]
    found = coco(folder, annotations=tree["annotations"])
    assert found.outside == 1, "the run says so"
    reader = DetectionReader(found, DATA, DetectSettings(scale=(1, 1)), 0)
    (batch,) = make_loader(DATA, source(folder), seed=0, batch_size=5, reader=reader).epoch(0)
    assert sorted(batch.targets["count"].tolist()) == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": [{"image_id": 1}]}, "is not in COCO's layout"),
        ({"categories": []}, "is not in COCO's layout"),
        ({"images": []}, "is not in COCO's layout"),
        ({"annotations": [], "categories": []}, "has no categories"),
        (
            {"categories": [{"id": 7, "name": "square"}]},
            r"changed.json: 4 of 8 annotations have a category_id that categories lacks, as 30; legal are 7",
        ),
        ({"annotations": [], "images": [{"id": 1, "file_name": "000.png", "height": 4, "width": 4}]}, "does not name"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_words(folder: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        coco(folder, **change)


def test_an_image_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "images/003.png").unlink()
    with pytest.raises(DataError, match=r"names images that the folder lacks: 003\.png"):
        coco(folder)


def test_text_and_missing_files_are_refused(folder: Path) -> None:
    (folder / "text.json").write_text("no JSON")
    for name, said in (("text.json", "is not JSON"), ("nothing.json", "cannot be read")):
        with pytest.raises(DataError, match=said):
            Coco(str(folder / name), "detect.annotations", source(folder))


def test_an_image_of_another_size_than_its_annotation_is_a_bad_sample(folder: Path) -> None:
    tree = json.loads((folder / "instances.json").read_text())
    tree["images"][2]["height"] += 1
    reader = DetectionReader(coco(folder, images=tree["images"]), DATA, DetectSettings(masks=False), 0)
    (batch,) = make_loader(DATA, source(folder), seed=0, batch_size=5, reader=reader).epoch(0)
    assert {(bad.id, bad.reason) for bad in batch.bad} == {(2, "it has 72 x 64 pixels, but its annotation has 72 x 65")}
