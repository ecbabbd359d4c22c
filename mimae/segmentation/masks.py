"""The masks of a source's images: how their files are found and read.

Letters in shapes: h, w an image.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import BadImage
from mimae.data.sources import lists
from mimae.data.sources.base import Source
from mimae.outside.paths import user_path
from mimae.outside.reading import open_regular
from mimae.outside.text import printable
from mimae.segmentation.labels import Labels

ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Extensions of masks. JPEG is not among them, because it changes values."""

_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
_SHOWN = 3


class Masks:
    """The masks of a source, by its sample ids."""

    def __init__(self, source: Source, folder: str | None, key: str, labels: Labels, max_pixels: int) -> None:
        """Find the mask of every image of a source.

        Args:
            folder: the folder of the masks, which have the names of the images; None: see `_by_layout`. A list file
                names the masks itself.
            key: the name of the setting, for messages.

        Raises DataError if an image has no mask.
        """
        self.labels, self.max_pixels = labels, max_pixels
        images = [source.path(i) for i in range(len(source))]
        if not os.path.exists(images[0]):
            raise DataError(
                f"{printable(source.name)} has images inside other files, but masks need image files: legal is a "
                "folder of images, or a list file with an image and its mask on each line"
            )
        is_list = Path(source.name).suffix.lower() in lists.EXTENSIONS
        if is_list:
            if folder is not None:
                raise DataError(
                    f"{key}={folder}: {printable(source.name)} is a list file, which names the masks itself; legal is "
                    f"{key}=null"
                )
            self.paths = _of_list(source)
        else:
            self.paths = _beside(images, source.name, folder) if folder is not None else _by_layout(images, key)
        if missing := [
            i for i, path in enumerate(self.paths) if path is None or (is_list and not os.path.isfile(path))
        ]:
            named = [f"  {printable(images[i])}: {printable(self.paths[i] or 'none of this name')}" for i in missing]
            more = [f"  and {len(missing) - _SHOWN:,} more"] * (len(missing) > _SHOWN)
            raise DataError(
                "\n".join(
                    [
                        f"{len(missing):,} of {len(images):,} images of {printable(source.name)} have no mask:",
                        *named[:_SHOWN],
                        *more,
                        f"A mask has the name of its image, with another extension ({', '.join(ENDINGS)}); add the "
                        "masks, or use a list file without these images",
                    ]
                )
            )

    def classes(self, i: int, size: tuple[int, int]) -> np.ndarray:
        """Return the class of each pixel of sample i, int16 (h, w); `size` is (height, width) of the image.

        Raises BadImage, with the mask's path, if the mask has another size, is in colours or damaged, or has values
        that belong to no class.
        """
        path = self.paths[i]
        assert path is not None
        try:
            return self.labels.classes(_values(path, size, self.max_pixels))
        except BadImage as error:
            raise BadImage(f"its mask {path}: {error}") from error


def _values(path: str, size: tuple[int, int], max_pixels: int) -> np.ndarray:
    try:
        with open(open_regular(path), "rb") as file:
            image = Image.open(io.BytesIO(file.read()), formats=_FORMATS)
        found = (image.height, image.width)
        if found != size:
            raise BadImage(f"it has {found[1]} x {found[0]} pixels, but the image has {size[1]} x {size[0]}")
        if found[0] * found[1] > max_pixels:
            raise BadImage(f"it has {found[0] * found[1]} pixels, more than data.max_pixels = {max_pixels}")
        if image.mode not in _MODES:
            raise BadImage(
                f"it has colours (mode {image.mode}), but a mask must be grey or have a palette, with the number of a "
                "class for each pixel"
            )
        return np.asarray(image).astype(np.int64)
    except BadImage:
        raise
    except Exception as error:  # Decoders raise almost any exception on damaged files.
        raise BadImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _of_list(source: Source) -> list[str | None]:
    """Return the masks in the second column of a list file; for other tasks this column is the class."""
    if source.labels is None or source.classes is None:
        raise DataError(
            f"{printable(source.name)} names only images; for segmentation each line must be an image and, after a tab "
            "(in .csv a comma), its mask"
        )
    folder = user_path(source.name).absolute().parent
    names = [os.path.join(folder, name) for name in source.classes]
    return [names[label] for label in source.labels.tolist()]


def _beside(images: list[str], root: str, folder: str) -> list[str | None]:
    """Return the masks in `folder`, which have the same relative paths as the images below `root`."""
    place = user_path(folder).absolute()
    if not place.is_dir():
        raise DataError(f"{printable(folder)} is not a folder; it must be a folder of masks with the images' names")
    start, listed = user_path(root).absolute(), cache(_listed)
    return [_find(listed, os.path.join(place, os.path.relpath(os.path.dirname(path), start)), path) for path in images]


def _by_layout(images: list[str], key: str) -> list[str | None]:
    """Return the masks of ADE20K's layout: images/SPLIT/NAME.jpg has annotations/SPLIT/NAME.png."""
    found: list[str | None] = []
    listed = cache(_listed)
    for path in images:
        before, part, after = os.path.dirname(path).rpartition(os.sep + "images")
        if not part or (after and not after.startswith(os.sep)):
            raise DataError(
                f"{key}=null, but {printable(path)} is not in a folder images/ that has a folder annotations/ next to "
                f"it: set {key} to a folder that has a mask with the name of each image, or set the path of the images "
                "to a list file with an image and its mask on each line"
            )
        found.append(_find(listed, f"{before}{os.sep}annotations{after}", path))
    return found


def _find(listed: Callable[[str], Mapping[str, list[str]]], folder: str, image: str) -> str | None:
    """Return the mask of an image in a folder, or None if there is none. Raises DataError if there are several."""
    stem = os.path.splitext(os.path.basename(image))[0]
    names = listed(os.path.normpath(folder)).get(stem, [])
    if len(names) > 1:
        raise DataError(f"{printable(image)} has several masks in {printable(folder)}: {', '.join(sorted(names))}")
    return os.path.normpath(os.path.join(folder, names[0])) if names else None


def _listed(folder: str) -> Mapping[str, list[str]]:
    """Return the masks of a folder by their names without extension."""
    found = defaultdict[str, list[str]](list)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        stem, ending = os.path.splitext(name)
        if ending.lower() in ENDINGS:
            found[stem].append(name)
    return found
