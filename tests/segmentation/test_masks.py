"""Tests of the search for masks, and of the messages for masks that cannot be used."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import BadImage
from mimae.data.sources.open import open_source
from mimae.segmentation.labels import Labels
from mimae.segmentation.masks import Masks
from mimae.segmentation.settings import SegmentSettings

LABELS, PIXELS = Labels(SegmentSettings(classes=4)), 1_000_000


def save(path: Path, value: int, size: tuple[int, int] = (6, 4), mode: str = "L") -> Path:
    """Save a grey image of one value; `size`: width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, value)
    if mode == "P":
        image.putpalette([255 - i // 3 for i in range(768)])
    (image.convert("RGB") if mode == "RGB" else image).save(path)
    return path


def classes(masks: Masks, count: int) -> list[int]:
    """Return the class of each mask, which has only one."""
    found = []
    for i in range(count):
        (value,) = np.unique(masks.classes(i, (4, 6)))
        found.append(int(value))
    return found


def test_ade20ks_layout_is_found(tmp_path: Path) -> None:
    """Masks are palette or grey images. The folder `images` closest to the image counts."""
    root = tmp_path / "images" / "ade"
    for i, name in enumerate("ab"):
        save(root / "images" / "training" / f"{name}.jpg", 0)
        save(root / "annotations" / "training" / f"{name}.png", i + 1, mode="LP"[i])
    assert classes(Masks(open_source(str(root / "images" / "training")), None, "segment.masks", LABELS, PIXELS), 2) == [
        1,
        2,
    ]


def test_a_folder_has_masks_under_the_names_of_the_images(tmp_path: Path) -> None:
    """Images may be in class folders, and extensions may differ."""
    for name, value, ending in (("x/a", 1, ".png"), ("x/b.c", 2, ".TIF"), ("y/a", 3, ".bmp")):
        save(tmp_path / "images" / f"{name}.jpg", 0)
        save(tmp_path / "masks" / f"{name}{ending}", value)
    masks = Masks(open_source(str(tmp_path / "images")), str(tmp_path / "masks"), "segment.masks", LABELS, PIXELS)
    assert classes(masks, 3) == [1, 2, 3]


def test_a_list_names_the_masks(tmp_path: Path) -> None:
    for i in (1, 2):
        save(tmp_path / f"{i}.png", 0)
        save(tmp_path / "labels" / f"m{i}.png", i)
    (tmp_path / "list.txt").write_text("2.png\tlabels/m2.png\n1.png\tlabels/m1.png\n1.png\tlabels/m2.png\n")
    assert classes(Masks(open_source(str(tmp_path / "list.txt")), None, "segment.masks", LABELS, PIXELS), 3) == [
        2,
        1,
        2,
    ]


def test_missing_masks_are_counted(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "images" / f"{i}.jpg", 0)
    save(tmp_path / "masks" / "3.png", 1)
    save(tmp_path / "masks" / "0.jpg", 1)
    with pytest.raises(DataError, match=r"(?s)^5 of 6 images of .* have no mask:.*0\.jpg.*and 2 more.*\.png, \.tif"):
        Masks(open_source(str(tmp_path / "images")), str(tmp_path / "masks"), "segment.masks", LABELS, PIXELS)
    (tmp_path / "list.txt").write_text("images/1.jpg\tmasks/3.png\nimages/2.jpg\tmasks/2.png\n")
    with pytest.raises(DataError, match=r"(?s)^1 of 2 images.*images/2\.jpg: .*masks/2\.png"):
        Masks(open_source(str(tmp_path / "list.txt")), None, "segment.masks", LABELS, PIXELS)


def shards(folder: Path) -> str:
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(save(folder / "a.png", 0), "a.png")
    return str(folder / "a.tar")


def several(folder: Path) -> str:
    for name in ("images/a.jpg", "annotations/a.png", "annotations/a.tif"):
        save(folder / name, 0)
    return str(folder / "images")


def bare_list(folder: Path) -> str:
    save(folder / "a.png", 0)
    (folder / "list.txt").write_text("a.png\n")
    return str(folder / "list.txt")


def elsewhere(folder: Path) -> str:
    save(folder / "myimages" / "a.png", 0)
    return str(folder / "myimages")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (shards, "images inside other files.*a folder of images, or a list file"),
        (several, "several masks in .*: a.png, a.tif"),
        (bare_list, "each line must be an image and, after a tab"),
        (elsewhere, "segment.masks=null.*not in a folder images/.*set segment.masks to a folder"),
    ],
)
def test_sources_without_masks_are_told_what_to_do(made: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        Masks(open_source(made(tmp_path)), None, "segment.masks", LABELS, PIXELS)


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [
        ((4, 6), "L", "it has 4 x 6 pixels, but the image has 6 x 4"),
        ((6, 4), "RGB", "it has colours .mode RGB.*grey or have a palette"),
        ((0, 0), "L", "UnidentifiedImageError"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(size: tuple[int, int], mode: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", 0)
    path = save(tmp_path / "annotations" / "a.png", 1, size if size[0] else (6, 4), mode)
    if not size[0]:
        path.write_bytes(b"none")
    masks = Masks(open_source(str(tmp_path / "images")), None, "segment.masks", LABELS, PIXELS)
    with pytest.raises(BadImage, match=rf"its mask .*annotations/a\.png: {message}"):
        masks.classes(0, (4, 6))
