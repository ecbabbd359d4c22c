"""Tests of annotations and examples: all forms of masks, one geometry for pixels, boxes and masks, clear errors."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

from mimae.data.loading.batch import DataError
from mimae.data.loading.loader import make_loader
from mimae.data.pixels.decode import BadImage, look
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.data.sources.subset import subset_of
from mimae.detection.average_precision import average_precision
from mimae.detection.coco import Coco, names_of
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
        masks = list(drawn.masks(i, which))
        assert np.array_equal(masks, list(panoptic.masks(i, which)))
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
        ({"categories": []}, "has no categories"),
        ({"images": []}, "has 8 of 8 annotations with an unknown image_id, such as 100; legal are none"),
        (
            {"categories": [{"id": 7, "name": "square"}]},
            r"changed.json has 4 of 8 annotations with an unknown category_id, such as 30; legal are 7",
        ),
        ({"categories": 2 * images.CATEGORIES}, "has several categories with the id 7"),
        ({"annotations": [], "images": [{"id": 1, "file_name": "000.png", "height": 4, "width": 4}]}, "does not name"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_words(folder: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        coco(folder, **change)


def _changed(folder: Path, kind: str, changes: Mapping[int, Mapping[str, Any]]) -> Coco:
    """Return the annotations after changes of some images or annotations, by their places in the file."""
    entries = json.loads((folder / "instances.json").read_text())[kind]
    for place, change in changes.items():
        entries[place] |= change
    return coco(folder, **{kind: entries})


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("images", {1: {"id": 100}}, "has several images with the id 100"),
        ("images", {1: {"id": -5}}, "has an image with the id -5; legal are"),
        ("images", {1: {"id": 10**30}}, "has an image with the id 10{30}; legal are"),
        ("images", {1: {"file_name": "000.png"}}, "has several images with the file_name 000.png"),
        ("annotations", {0: {"bbox": [1, 2]}, 1: {"bbox": [3, 4]}}, "a box of image 100 is not four finite numbers"),
        ("annotations", {0: {"bbox": [1, 2, 3, math.nan]}}, "a box of image 100 is not four finite numbers"),
        ("annotations", {i: {"bbox": [0.1, 0.2, 0.3, 0.4]} for i in range(8)}, "has no box as large as a pixel"),
        # JSON has numbers that neither float64 nor an integer can be.
        ("images", {0: {"id": math.inf}}, "is not in COCO's layout .OverflowError"),
        ("images", {0: {"height": 10**400}}, "is not in COCO's layout .OverflowError"),
        ("annotations", {0: {"area": 10**400}}, "is not in COCO's layout .OverflowError"),
        ("annotations", {0: {"bbox": [10**400, 0, 1, 1]}}, "is not in COCO's layout .OverflowError"),
    ],
)
def test_annotations_that_contradict_themselves_are_refused(
    folder: Path, kind: str, changes: dict[int, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        _changed(folder, kind, changes)


def test_names_that_occur_twice_are_told_apart_by_their_folders(folder: Path, tmp_path: Path) -> None:
    for place, name in enumerate(("north", "south")):
        (folder / "images" / name).mkdir()
        (folder / f"images/00{place}.png").rename(folder / f"images/{name}/1.png")
    found = _changed(folder, "images", {0: {"file_name": "south/1.png"}, 1: {"file_name": "north/1.png"}})
    assert found.image_ids == [106, 109, 112, 103, 100] and found.stems[-1] == "south/1"
    with pytest.raises(DataError, match=r"does not name south/1\.png"):
        _changed(folder, "images", {0: {"file_name": "1.png"}, 1: {"file_name": "north/1.png"}})


def test_a_part_of_the_images_has_its_annotations(folder: Path) -> None:
    part = subset_of(source(folder), "2")
    found = Coco(str(folder / "instances.json"), "detect.annotations", part)
    assert found.image_ids == [100 + 3 * int(part.path(i)[-5]) for i in range(2)]


@pytest.mark.parametrize(
    ("segmentation", "pixels"),
    [
        # Two points enclose nothing. The library takes four numbers for a box, and all that follows as well.
        ([[1, 2, 5, 6]], 0),
        ([[1, 2, 5, 6], [10, 10, 20, 10, 20, 20, 10, 20]], 100),
        ([[]], 0),
        ([[10, 10, 20, 10, 20, 20, 10]], "a polygon must be a list of pairs"),
        ([10, 10, 20, 10, 20, 20], "a polygon must be a list of pairs"),
        # These would take all memory of the machine.
        ([[10, 10, math.nan, 10, 20, 20]], "a polygon has a coordinate that is not a number up to 1,000,000"),
        ([[10, 10, 1e12, 10, 20, 20]], "a polygon has a coordinate that is not a number up to 1,000,000"),
        ({"size": [20, 16], "counts": [5, 10, 305]}, "the mask of an object has 16 x 20 pixels, not 72 x 64"),
        ([[10, 10, 10**400, 10, 20, 20]], "a polygon has a coordinate that is not a number up to 1,000,000"),
        ({"size": [64, 72], "counts": [5, 10]}, "is neither polygons nor RLE"),
        ({"size": [64, 72], "counts": [10**400, 10]}, "is neither polygons nor RLE"),
        ({"size": [math.inf, 72], "counts": [5, 10]}, "the mask of an object has 72 x inf pixels"),
    ],
)
def test_masks_that_enclose_nothing_are_empty_and_damaged_ones_bad(
    folder: Path, segmentation: Any, pixels: int | str
) -> None:
    found = _changed(folder, "annotations", {0: {"segmentation": segmentation}})
    if isinstance(pixels, int):
        assert sum(mask.sum() for mask in found.masks(0, np.array([0]))) == pixels
    else:
        with pytest.raises(BadImage, match=pixels):
            list(found.masks(0, np.array([0])))
        reader = DetectionReader(found, DATA, DetectSettings(), None)
        (batch,) = make_loader(DATA, source(folder), seed=0, batch_size=5, reader=reader).epoch(0)
        assert [bad.id for bad in batch.bad] == [0], "an evaluation leaves the image out"


def test_masks_of_an_image_may_have_several_forms(folder: Path) -> None:
    drawn, panoptic = coco(folder), str(folder / "panoptic")
    _changed(folder, "annotations", {0: {"segment_id": None}})
    mixed = Coco(str(folder / "changed.json"), "detect.annotations", source(folder), panoptic)
    assert isinstance(mixed.objects[0].segments[0], list) and isinstance(mixed.objects[0].segments[1], int)
    assert np.array_equal(list(mixed.masks(0, np.arange(2))), list(drawn.masks(0, np.arange(2))))
    _changed(folder, "annotations", {0: {"segment_id": 77777}})
    other = Coco(str(folder / "changed.json"), "detect.annotations", source(folder), panoptic)
    with pytest.raises(BadImage, match="its panoptic picture has no pixel of the segment 77777"):
        list(other.masks(0, np.arange(2)))


def test_masks_are_drawn_one_at_a_time_over_one_reading_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All masks in one array would take as many bytes as they have pixels.

    The limit is half of them. A few masks, the image, its panoptic picture and the packed targets fit into it.
    """
    side, count = 192, 96
    tree = images.write(tmp_path, 2, side)
    each = tree["annotations"][0]
    several = [each | {"id": number} for number in range(count)]
    (tmp_path / "instances.json").write_text(json.dumps(tree | {"annotations": several}))
    places = [source(tmp_path), str(tmp_path / "panoptic")]
    drawn, panoptic = (Coco(str(tmp_path / "instances.json"), "detect.annotations", *places[:n]) for n in (1, 2))
    readings: list[int] = []
    read = Coco._panoptic_ids

    def counted(self: Coco, i: int) -> np.ndarray:
        readings.append(i)
        return read(self, i)

    monkeypatch.setattr(Coco, "_panoptic_ids", counted)
    encoded = look((tmp_path / "images/000.png").read_bytes(), DATA.max_pixels)
    settings = DetectSettings(max_objects=count)
    for found in (drawn, panoptic):
        for use in (
            partial(DetectionReader(found, DATA, settings, None), encoded, 0, 0, 0),
            partial(DetectionReader(found, DATA, settings, 0), encoded, 0, 0, 0),
            partial(average_precision, found, [0], [], True),
        ):
            use()  # Libraries are imported.
            tracemalloc.start()
            try:
                use()
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak < count * side * (side + 8) / 2, (use, peak)
    assert len(readings) == 2 * 3


def test_a_crowd_without_a_mask_is_its_box(folder: Path) -> None:
    found = _changed(folder, "annotations", {0: {"iscrowd": 1, "segmentation": None, "bbox": [3.5, 2, 4, 5]}})
    assert found.has_masks()
    (mask,) = found.masks(0, np.array([0]))
    assert mask[2:7, 3:8].all() and mask.sum() == 25
    assert not _changed(folder, "annotations", {0: {"iscrowd": "0"}}).objects[0].crowd.any()


def test_boxes_that_reach_beyond_their_images_are_counted(folder: Path) -> None:
    """Corners in the place of width and height reach beyond the image."""
    found = _changed(folder, "annotations", {0: {"bbox": [40, 40, 60, 60]}, 1: {"bbox": [-0.5, 2, 10, 10]}})
    assert (found.cut, found.outside) == (1, 0) and found.objects[0].boxes[0].tolist() == [40, 40, 72, 64]


def test_objects_are_counted_and_missing_classes_named(folder: Path) -> None:
    assert coco(folder).summary() == "8 objects in 4 of 5 images"
    crowds = _changed(folder, "annotations", {place: {"iscrowd": 1} for place in (0, 2, 4, 6)})
    assert crowds.summary() == "4 objects in 4 of 5 images"
    none = coco(folder, annotations=[])
    assert none.summary() == "0 objects in 0 of 5 images, none of the class square (7), disc (30)"


def test_names_are_one_line_and_different(folder: Path) -> None:
    categories = [{"id": 7, "name": "a\nb"}, {"id": 30, "name": "a\nb"}]
    assert coco(folder, categories=categories).classes == [r"a\nb (7)", r"a\nb (30)"]
    assert names_of([(1, "a"), (2, "a"), (3, "a (1)"), (4, "b")]) == ["a (1) (1)", "a (2)", "a (1) (3)", "b"]


def test_a_validation_file_may_lack_categories_and_have_another_order(folder: Path) -> None:
    known = coco(folder)
    coco(folder, categories=images.CATEGORIES[::-1])
    place = str(folder / "changed.json"), "detect.val_annotations", source(folder), None
    turned = Coco(*place, known.categories)
    assert turned.classes == known.classes and turned.objects[0].classes.tolist() == known.objects[0].classes.tolist()
    with pytest.raises(DataError, match=r"other categories than the detector: square \(7\); legal are disc \(30\)"):
        Coco(*place, known.categories[1:])


def test_an_image_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "images/003.png").unlink()
    with pytest.raises(DataError, match=r"names images that the folder lacks: 003\.png"):
        coco(folder)


def test_text_and_missing_files_are_refused(folder: Path) -> None:
    (folder / "text.json").write_text("no JSON")
    unknown_user = "~nobody-has-this-name/a.json"
    for file, said in (
        (str(folder / "text.json"), "is not JSON"),
        (str(folder / "nothing.json"), "cannot be read"),
        (unknown_user, f"{unknown_user} cannot be read"),
    ):
        with pytest.raises(DataError, match=said):
            Coco(file, "detect.annotations", source(folder))
    found = Coco(str(folder / "instances.json"), "detect.annotations", source(folder), "~nobody-has-this-name")
    assert found.panoptic == Path("~nobody-has-this-name"), "its images are bad"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"none", "cannot be read"), (None, "has 8 x 4 pixels, but the image has 72 x 64"), (b"", "cannot be read")],
)
def test_a_panoptic_picture_that_does_not_fit_is_bad(folder: Path, content: bytes | None, said: str) -> None:
    picture = folder / "panoptic/000.png"
    if content is None:
        Image.new("RGB", (8, 4)).save(picture)
    else:
        picture.write_bytes(content)
    found = Coco(str(folder / "instances.json"), "detect.annotations", source(folder), str(folder / "panoptic"))
    with pytest.raises(BadImage, match=f"its panoptic picture .*000.png {said}"):
        list(found.masks(0, np.arange(2)))


def test_annotations_are_not_read_from_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(DataError, match="cannot be read: it is not a regular file"):
        Coco(str(folder / "pipe"), "detect.annotations", source(folder))


def test_an_image_of_another_size_than_its_annotation_is_a_bad_sample(folder: Path) -> None:
    tree = json.loads((folder / "instances.json").read_text())
    tree["images"][2]["height"] += 1
    reader = DetectionReader(coco(folder, images=tree["images"]), DATA, DetectSettings(masks=False), 0)
    (batch,) = make_loader(DATA, source(folder), seed=0, batch_size=5, reader=reader).epoch(0)
    assert {(bad.id, bad.reason) for bad in batch.bad} == {(2, "it has 72 x 64 pixels, but its annotation has 72 x 65")}
