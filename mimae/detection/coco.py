"""Annotations in COCO's layout: the objects of each image, and their masks as polygons, RLE or panoptic segments.

A box is (left, top, right, bottom) in pixels of the upright image. Categories may have any ids. The number of a class
is the position of its category in the file, from 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import BadImage
from mimae.data.sources.base import Source
from mimae.outside.text import printable

Category = tuple[int, str]
"""Id and name."""

MAX_BYTES = 4_000_000_000
"""Largest allowed size of an annotation file."""


class Objects(NamedTuple):
    """The objects of an image."""

    boxes: np.ndarray
    """float32 (n, 4)."""
    classes: np.ndarray
    """int64 (n,)."""
    crowd: np.ndarray
    """bool (n,): True for a region with many objects, which is not trained on and not counted if it is missed."""
    segments: list[Any]
    """Mask of each object: polygons, RLE, or the id of a panoptic segment; None if there is no mask."""
    height: int
    width: int


class Coco:
    """The annotations in a COCO file for the images of a source."""

    def __init__(self, file: str, key: str, source: Source, panoptic: str | None = None) -> None:
        """Read the annotations of the images of `source`, which are matched by their file names.

        `key` is the setting that names `file`, for messages. Raises DataError if the file is not a COCO file, if it
        names images that the source lacks, or if the source has an image that the file does not name.
        """
        self.file, self.key, self.outside = file, key, 0
        self.panoptic = None if panoptic is None else Path(panoptic)
        tree = self._read()
        try:
            self.categories: list[Category] = [(int(each["id"]), str(each["name"])) for each in tree["categories"]]
            images = {int(each["id"]): each for each in tree["images"]}
            by_image: dict[int, list[Any]] = {number: [] for number in images}
            class_of = {number: place for place, (number, _) in enumerate(self.categories)}
            for each in tree["annotations"]:
                by_image[int(each["image_id"])].append(each)
            unknown = _unknown(tree["annotations"], class_of) if class_of else None
            names = {str(images[number]["file_name"]).rpartition("/")[2]: number for number in images}
            numbers = () if unknown else images
            found = {number: self._objects(images[number], by_image[number], class_of) for number in numbers}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{key}={file} is not in COCO's layout ({type(error).__name__}: {printable(str(error))}); it needs "
                "images, annotations and categories, like instances_train2017.json"
            ) from error
        if not self.categories:
            raise DataError(f"{key}={file} has no categories")
        if unknown:
            raise DataError(f"{key}={file}: {unknown}")
        own = [source.path(i).rpartition("/")[2] for i in range(len(source))]
        strange = [name for name in own if name not in names]
        missing = sorted(names.keys() - set(own))
        for what, which in (("does not name", strange), ("names images that the folder lacks:", missing)):
            if which:
                raise DataError(
                    f"{key}={file} {what} {printable(which[0])}{f' and {len(which) - 1} more' if which[1:] else ''}; "
                    f"it has to be the file of the images of {printable(source.name)}"
                )
        self.image_ids = [names[name] for name in own]
        """COCO's id of each image of the source."""
        self.objects = [found[number] for number in self.image_ids]
        """The objects of each image of the source. `outside` counts those that were left out: their boxes are empty, or
        outside of their images."""
        self.stems = [name.rpartition(".")[0] for name in own]

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return [name for _, name in self.categories]

    def masks(self, i: int, which: np.ndarray) -> np.ndarray:
        """Return the masks of the objects `which` of image `i`, bool (n, height, width).

        Raises BadImage if a mask is damaged.
        """
        objects = self.objects[i]
        wanted = [objects.segments[place] for place in which.tolist()]
        shape = (len(wanted), objects.height, objects.width)
        if any(isinstance(each, int) for each in wanted):
            ids = self._panoptic_ids(i)
            return np.stack([ids == each for each in wanted]) if wanted else np.zeros(shape, bool)
        return np.stack([_drawn(each, *shape[1:]) for each in wanted]) if wanted else np.zeros(shape, bool)

    def has_masks(self) -> bool:
        """Return True if every object that is trained on has a mask."""
        return all(
            segment is not None
            for objects in self.objects
            for segment, crowd in zip(objects.segments, objects.crowd)
            if not crowd
        )

    def _read(self) -> Any:
        try:
            size = Path(self.file).stat().st_size
            if size > MAX_BYTES:
                raise DataError(f"{self.key}={self.file} has {size:,} bytes: legal are at most {MAX_BYTES:,}")
            return json.loads(Path(self.file).read_bytes())
        except OSError as error:
            raise DataError(f"{self.key}={self.file} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.key}={self.file} is not JSON: {printable(str(error))[:200]}") from error

    def _objects(self, image: Any, annotations: list[Any], class_of: dict[int, int]) -> Objects:
        height, width = int(image["height"]), int(image["width"])
        boxes = np.array([each["bbox"] for each in annotations], np.float32).reshape(-1, 4)
        if not np.isfinite(boxes).all():
            raise ValueError(f"a box of image {image['id']} is not finite")
        boxes[:, 2:] += boxes[:, :2]
        inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        # A box outside its image is left out, because it shows no object.
        kept = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(1))
        self.outside += len(boxes) - len(kept)
        return Objects(
            inside[kept],
            np.array([class_of[int(annotations[place]["category_id"])] for place in kept], np.int64),
            np.array([bool(annotations[place].get("iscrowd", 0)) for place in kept], bool),
            [_segment(annotations[place], self.panoptic is not None) for place in kept],
            height,
            width,
        )

    def _panoptic_ids(self, i: int) -> np.ndarray:
        assert self.panoptic is not None
        file = self.panoptic / f"{self.stems[i]}.png"
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB")).astype(np.int64)
        except (OSError, ValueError) as error:
            raise BadImage(f"its panoptic picture {file} cannot be read: {error}") from error
        ids: np.ndarray = pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]
        if ids.shape != (self.objects[i].height, self.objects[i].width):
            raise BadImage(
                f"its panoptic picture {file} has {ids.shape[1]} x {ids.shape[0]} pixels, but the image has "
                f"{self.objects[i].width} x {self.objects[i].height}"
            )
        return ids


def _unknown(annotations: list[Any], class_of: dict[int, int]) -> str | None:
    """Return what is wrong with annotations of categories that the file lacks; None where nothing is."""
    wrong = [each for each in annotations if int(each["category_id"]) not in class_of]
    if not wrong:
        return None
    numbers = ", ".join(map(str, list(class_of)[:8])) + ", ..." * (len(class_of) > 8)
    return (
        f"{len(wrong):,} of {len(annotations):,} annotations have a category_id that categories lacks, as "
        f"{wrong[0]['category_id']}; legal are {numbers}"
    )


def _segment(annotation: Any, is_panoptic: bool) -> Any:
    """Return the mask of an object in the form of its annotation, see `Objects.segments`."""
    if is_panoptic and "segment_id" in annotation:
        return int(annotation["segment_id"])
    return annotation.get("segmentation") or None


def _drawn(segment: Any, height: int, width: int) -> np.ndarray:
    """Return a mask bool (height, width), drawn from polygons or RLE. Raises BadImage if they are malformed."""
    from faster_coco_eval.core import mask as coco_mask

    try:
        if isinstance(segment, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(segment, height, width))
        elif isinstance(segment["counts"], list):
            runs = coco_mask.frPyObjects(segment, height, width)
        else:
            runs = segment
        drawn: np.ndarray = coco_mask.decode(runs).astype(bool)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise BadImage(
            f"the mask of an object is neither polygons nor RLE ({type(error).__name__}: {error})"
        ) from error
    if drawn.shape != (height, width):
        raise BadImage(f"the mask of an object has {drawn.shape[1]} x {drawn.shape[0]} pixels, not {width} x {height}")
    return drawn
