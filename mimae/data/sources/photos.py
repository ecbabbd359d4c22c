"""The embedded images: square crops of the photographs that are part of scikit-image's wheel.

They are written to the cache once, as image files, and then read like any folder. So a first run needs no download and
uses the same code as every other run.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.pixels.augment import below
from mimae.data.sources.index import cache_folder
from mimae.randomness import Purpose, words

SPLITS = {"photos": "train", "photos-test": "test"}
"""Folder of each embedded set, by its name."""

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "stereo_motorcycle": "motorcycle_left.png",
    "text": "text.png",
}
"""File of each class in scikit-image's data folder."""

_VERSION = "photos-v1"
_CROPS = {"train": 400, "test": 100}
_SIDES = (40, 100)


def folder(name: str) -> Path:
    """Return the folder of the embedded set `name`; write it first if it does not exist. Raises DataError."""
    home = cache_folder() / _VERSION
    if not home.is_dir():
        _write(home)
    return home / SPLITS[name]


def _write(home: Path) -> None:
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_VERSION}.", dir=home.parent))
    except OSError as error:
        raise DataError(
            f"cannot write the embedded photographs to {home}: {error.strerror}. "
            f"Set XDG_CACHE_HOME to a writable folder."
        ) from error
    try:
        for number, (name, file) in enumerate(PHOTOGRAPHS.items()):
            _cut(number, _carried(file), temporary, name)
        try:
            temporary.rename(home)
        except OSError:
            # Another process was faster; its crops are the same.
            if not home.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _carried(file: str) -> Path:
    """Return a file in scikit-image's data folder. It is never downloaded, as scikit-image's own functions would do."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise DataError("the embedded photographs come from scikit-image, which is not installed")
    path = Path(found.submodule_search_locations[0]) / "data" / file
    if not path.is_file():
        raise DataError(f"this version of scikit-image has no {file}, which the embedded photographs need")
    return path


def _cut(number: int, photograph: Path, home: Path, name: str) -> None:
    """Cut one photograph: training crops from the left 60 % of its width, test crops from the right 40 %."""
    with Image.open(photograph) as image:
        image.load()
    border = image.width * 6 // 10
    ids = number * sum(_CROPS.values()) + torch.arange(sum(_CROPS.values()))
    draws = iter(words(0, Purpose.CROP, 0, ids, 3).tolist())
    for split, (left, right) in {"train": (0, border), "test": (border, image.width)}.items():
        target = home / split / name
        target.mkdir(parents=True)
        largest = min(_SIDES[1], right - left, image.height)
        for i in range(_CROPS[split]):
            side_word, top_word, left_word = next(draws)
            side = _SIDES[0] + below(side_word, largest - _SIDES[0] + 1)
            x, y = left + below(left_word, right - left - side + 1), below(top_word, image.height - side + 1)
            image.crop((x, y, x + side, y + side)).save(target / f"{i:04}.png", compress_level=1)
