"""Annotations in COCO's layout: the objects of each image, and their masks as polygons, RLE or panoptic segments.

A box is (left, top, right, bottom) in pixels of the upright image. Categories may have any ids. The number of a class
is the position of its category in the file, from 0.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import BadImage
from mimae.data.sources.base import Source
from mimae.data.sources.subset import Subset
from mimae.outside.paths import user_path
from mimae.outside.reading import open_regular
from mimae.outside.text import printable

Category = tuple[int, str]
"""Id and name."""

MAX_BYTES = 4_000_000_000
"""Largest allowed size of an annotation file."""

FARTHEST = 1e6
"""Largest allowed coordinate of a polygon. Drawing a polygon takes memory in proportion to its length."""

_NAMED = 5
"""Number of categories that a message names."""

_POINTS = 3
"""Least number of points of a polygon that encloses anything."""


class Objects(NamedTuple):
    """The objects of an image."""

    boxes: np.ndarray
    """float32 (n, 4)."""
    classes: np.ndarray
    """int64 (n,)."""
    crowd: np.ndarray
    """bool (n,): True for a region with many objects, which is not trained on and not counted if it is missed."""
    areas: np.ndarray
    """float64 (n,): the area of each object by its annotation, in pixels; 0 where the annotation has none."""
    segments: list[Any]
    """Mask of each object: polygons, RLE, or the id of a panoptic segment; None if there is no mask."""
    height: int
    width: int


class Coco:
    """The annotations in a COCO file for the images of a source."""

    def __init__(
        self,
        file: str,
        key: str,
        source: Source,
        panoptic: str | None = None,
        categories: Sequence[Category] | None = None,
    ) -> None:
        """Read the annotations of the images of `source`, which are matched by their file names.

        Args:
            key: the setting that names `file`, for messages.
            panoptic: the folder of panoptic pictures.
            categories: the categories of the classes, of which the file may lack some; None: those of the file.

        Raises DataError if the file is not a COCO file, if it contradicts itself, if it names images that the source
        lacks, or if the source has an image that the file does not name.
        """
        self.file, self.key, self.outside, self.cut = file, key, 0, 0
        self.panoptic = None if panoptic is None else user_path(panoptic)
        tree = self._read()
        try:
            self.own: list[Category] = [(int(each["id"]), printable(str(each["name"]))) for each in tree["categories"]]
            self.categories = list(categories or self.own)
            class_of = {number: place for place, (number, _) in enumerate(self.categories)}
            problem = self._contradiction(tree["images"], tree["annotations"], class_of)
            images = {int(each["id"]): each for each in tree["images"]}
            by_image: dict[int, list[Any]] = {number: [] for number in images}
            if not problem:
                for each in tree["annotations"]:
                    by_image[int(each["image_id"])].append(each)
            names = {number: str(each["file_name"]) for number, each in images.items()}
            found = {number: self._objects(images[number], by_image[number], class_of) for number in images}
        # JSON has numbers of any size, and most readers take Infinity for one.
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{key}={file} is not in COCO's layout ({type(error).__name__}: {printable(str(error))}); it needs "
                "images, annotations and categories, like instances_train2017.json"
            ) from error
        if problem:
            raise DataError(f"{key}={file} {problem}")
        self._match(names, source)
        self.objects = [found[number] for number in self.image_ids]
        """The objects of each image of the source. `outside` counts those that were left out: their boxes are empty, or
        outside of their images. `cut` counts those whose boxes reach beyond their images by a pixel or more."""
        boxes = np.concatenate([each.boxes for each in self.objects])
        if len(boxes) and not (boxes[:, 2:] - boxes[:, :2] >= 1).any():
            raise DataError(
                f"{key}={file} has no box as large as a pixel; legal are [left, top, width, height] in pixels, not in "
                "shares of the image"
            )

    def _contradiction(self, images: list[Any], annotations: list[Any], class_of: dict[int, int]) -> str | None:
        """Return what contradicts itself in the file; None if nothing does."""
        if not self.own:
            return "has no categories"
        if strange := [each for each in self.own if each not in self.categories]:
            return f"has other categories than the detector: {_listed(strange)}; legal are {_listed(self.categories)}"
        known = [int(each["id"]) for each in images]
        if beyond := [number for number in known if not 0 <= number < 1 << 63]:
            return f"has an image with the id {beyond[0]}; legal are 0 to 2^63 - 1"
        for what, numbers in (("images", known), ("categories", [number for number, _ in self.own])):
            if twice := [number for number, count in Counter(numbers).items() if count > 1]:
                return f"has several {what} with the id {twice[0]}; an id belongs to one of them"
        return _unknown(annotations, "category_id", class_of) or _unknown(annotations, "image_id", dict.fromkeys(known))

    def _match(self, names: dict[int, str], source: Source) -> None:
        """Find the annotation of each image of a source by the end of its path. Raises DataError.

        `names` has the file name of each image of the file, by its id. Names are compared without their folders, or,
        where names occur several times, with as many folders as make them unique.
        """
        whole = source.whole if isinstance(source, Subset) else source
        root = os.path.join(os.path.abspath(os.path.expanduser(source.name)), "")
        paths = [os.path.abspath(whole.path(i)).removeprefix(root) for i in range(len(whole))]
        levels = max((name.count("/") for name in names.values()), default=0) + 1
        unique = (n for n in range(1, levels + 1) if _are_unique(names.values(), n) and _are_unique(paths, n))
        parts = next(unique, levels + 1)
        ids = {_end(name, parts): number for number, name in names.items()}
        if len(ids) < len(names):
            (twice, _), *_ = Counter(_end(name, parts) for name in names.values()).most_common(1)
            raise DataError(f"{self.key}={self.file} has several images with the file_name {printable(twice)}")
        strange = [name for path in paths if (name := _end(path, parts)) not in ids]
        missing = sorted(ids.keys() - {_end(path, parts) for path in paths})
        for what, which in (("does not name", strange), ("names images that the folder lacks:", missing)):
            if which:
                raise DataError(
                    f"{self.key}={self.file} {what} {printable(which[0])}"
                    f"{f' and {len(which) - 1} more' if which[1:] else ''}; it has to be the file of the images of "
                    f"{printable(source.name)}"
                )
        ids_of = source.ids.tolist() if isinstance(source, Subset) else range(len(source))
        own = [_end(paths[i], parts) for i in ids_of]
        self.image_ids = [ids[name] for name in own]
        """COCO's id of each image of the source."""
        self.stems = [name.rpartition(".")[0] for name in own]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, see `names_of`."""
        return names_of(self.categories)

    def masks(self, i: int, which: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the masks of the objects `which` of image `i` one by one, each bool (height, width).

        All masks of a large photograph with many objects would take gigabytes. The mask of a crowd region without one
        is its box. Raises BadImage if a mask is damaged or missing.
        """
        objects = self.objects[i]
        segments = [objects.segments[place] for place in which.tolist()]
        ids = self._panoptic_ids(i) if any(isinstance(each, int) for each in segments) else None
        for segment, place in zip(segments, which.tolist()):
            if isinstance(segment, int):
                assert ids is not None
                mask: np.ndarray = ids == segment
                if not mask.any():
                    raise BadImage(f"its panoptic picture has no pixel of the segment {segment}")
            elif segment is not None:
                mask = _drawn(segment, objects.height, objects.width)
            elif objects.crowd[place]:
                left, top, right, bottom = objects.boxes[place].tolist()
                mask = np.zeros((objects.height, objects.width), bool)
                mask[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
            else:
                raise BadImage("an object has no mask")
            yield mask

    def summary(self) -> str:
        """Return in words how many objects there are, without crowd regions, and which classes have none."""
        counts = [int((~each.crowd).sum()) for each in self.objects]
        present = {place for each in self.objects for place in each.classes[~each.crowd].tolist()}
        missing = [category for place, category in enumerate(self.categories) if place not in present]
        found = f"{sum(counts):,} objects in {sum(map(bool, counts)):,} of {len(counts):,} images"
        return f"{found}, none of the class {_listed(missing)}" if missing else found

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
            with open(open_regular(user_path(self.file)), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise DataError(f"{self.key}={self.file} has {size:,} bytes: legal are at most {MAX_BYTES:,}")
                return json.loads(file.read())
        except OSError as error:
            raise DataError(f"{self.key}={self.file} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.key}={self.file} is not JSON: {printable(str(error))[:200]}") from error

    def _objects(self, image: Any, annotations: list[Any], class_of: dict[int, int]) -> Objects:
        height, width = int(image["height"]), int(image["width"])
        listed = [each["bbox"] for each in annotations]
        are_four = all(len(each) == 4 for each in listed)
        boxes = np.array(listed if are_four else [], np.float32).reshape(-1, 4)
        if not are_four or not np.isfinite(boxes).all():
            raise ValueError(f"a box of image {image['id']} is not four finite numbers")
        boxes[:, 2:] += boxes[:, :2]
        inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        # A box outside its image is left out, because it shows no object.
        kept = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(1))
        self.outside += len(boxes) - len(kept)
        self.cut += int((np.abs(boxes - inside)[kept] >= 1).any(1).sum())
        return Objects(
            inside[kept],
            np.array([class_of[int(annotations[place]["category_id"])] for place in kept], np.int64),
            np.array([bool(int(annotations[place].get("iscrowd") or 0)) for place in kept], bool),
            np.array([float(annotations[place].get("area") or 0) for place in kept], np.float64),
            [_segment(annotations[place], self.panoptic is not None) for place in kept],
            height,
            width,
        )

    def _panoptic_ids(self, i: int) -> np.ndarray:
        assert self.panoptic is not None
        file = self.panoptic / f"{self.stems[i]}.png"
        try:
            with open(open_regular(file), "rb") as opened, Image.open(opened, formats=["PNG"]) as image:
                size = (self.objects[i].width, self.objects[i].height)
                if image.size != size:
                    raise BadImage(
                        f"its panoptic picture {file} has {image.width} x {image.height} pixels, but the image has "
                        f"{size[0]} x {size[1]}"
                    )
                pixels = np.asarray(image.convert("RGB")).astype(np.int32)
        except BadImage:
            raise
        except Exception as error:  # Decoders raise almost any exception on damaged files.
            raise BadImage(f"its panoptic picture {file} cannot be read: {error}") from error
        ids: np.ndarray = pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]
        return ids


def names_of(categories: Sequence[Category]) -> list[str]:
    """Return a different name for each category: a name that several of them have is followed by the id."""
    names = [name for _, name in categories]
    # A name with an id may be the name of another category, which then gets its own id.
    while len(counts := Counter(names)) < len(names):
        names = [f"{name} ({number})" if counts[name] > 1 else name for name, (number, _) in zip(names, categories)]
    return names


def _listed(categories: Sequence[Category]) -> str:
    """Return the first categories in words."""
    more = f", ... ({len(categories)} in all)" * (len(categories) > _NAMED)
    return ", ".join(f"{name} ({number})" for number, name in categories[:_NAMED]) + more


def _end(path: str, parts: int) -> str:
    """Return the last parts of a path."""
    return "/".join(path.split("/")[-parts:])


def _are_unique(paths: Collection[str], parts: int) -> bool:
    """Return True if no two paths have the same end."""
    return len({_end(path, parts) for path in paths}) == len(paths)


def _unknown(annotations: list[Any], key: str, known: dict[int, Any]) -> str | None:
    """Return a complaint about annotations whose `key` is none of the known ids; None if there are none."""
    wrong = [each for each in annotations if int(each[key]) not in known]
    if not wrong:
        return None
    numbers = ", ".join(map(str, list(known)[:8])) + ", ..." * (len(known) > 8)
    return (
        f"has {len(wrong):,} of {len(annotations):,} annotations with an unknown {key}, such as {wrong[0][key]}; legal "
        f"are {numbers or 'none'}"
    )


def _segment(annotation: Any, is_panoptic: bool) -> Any:
    """Return the mask of an object in the form of its annotation, see `Objects.segments`."""
    if is_panoptic and annotation.get("segment_id") is not None:
        return int(annotation["segment_id"])
    return annotation.get("segmentation") or None


def _drawn(segment: Any, height: int, width: int) -> np.ndarray:
    """Return a mask bool (height, width), drawn from polygons or RLE. Raises BadImage if they are malformed."""
    from faster_coco_eval.core import mask as coco_mask

    try:
        if isinstance(segment, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(_polygons(segment), height, width))
        else:
            rows, columns = segment["size"]
            if (rows, columns) != (height, width):
                raise BadImage(f"the mask of an object has {columns} x {rows} pixels, not {width} x {height}")
            is_text = not isinstance(segment["counts"], list)
            runs = segment if is_text else coco_mask.frPyObjects(segment, height, width)
        drawn: np.ndarray = coco_mask.decode(runs).astype(bool)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise BadImage(
            f"the mask of an object is neither polygons nor RLE ({type(error).__name__}: {error})"
        ) from error
    return drawn


def _polygons(segment: list[Any]) -> list[Any]:
    """Return the polygons of an object that enclose anything. Raises ValueError if one is malformed.

    The library would take four numbers for a box.
    """
    for each in segment:
        if not isinstance(each, list) or len(each) % 2:
            raise ValueError("a polygon must be a list of pairs of numbers")
        if not all(abs(number) <= FARTHEST for number in each):
            raise ValueError(f"a polygon has a coordinate that is not a number up to {FARTHEST:,.0f}")
    # A list without a polygon would have no size.
    return [each for each in segment if len(each) >= 2 * _POINTS] or [[0.0] * 2 * _POINTS]
