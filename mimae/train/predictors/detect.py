"""The objects of images, as one file in the format of COCO's results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from mimae.data.loading.batch import Batch
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.detection import drawing
from mimae.detection.average_precision import as_rows
from mimae.detection.coco import Category, names_of
from mimae.detection.examples import FittedReader
from mimae.train.predictors.base import Predictor, Write, whole_file


class Found(NamedTuple):
    """The objects of an image."""

    objects: dict[str, Tensor]
    """Result of `ViTDet.detect`, on the CPU."""
    size: tuple[int, int]
    """Height and width of the image in its file."""
    on_canvas: tuple[int, int]
    """Height and width of the image on the canvas."""


class ObjectPredictor(Predictor[Found]):
    """Finds boxes, classes, scores and masks of objects."""

    out = "a JSON file"
    options = frozenset({"overlays"})
    batch = 8

    def __init__(
        self,
        categories: Sequence[Category],
        detect: Callable[[Batch], list[dict[str, Tensor]]],
        data: DataSettings,
    ) -> None:
        self.categories, self.detect, self.reader = categories, detect, FittedReader(data)

    def find(self, batch: Batch) -> list[Found]:
        sizes = (batch.targets[name].tolist() for name in ("source_size", "size"))
        return [
            Found({name: each.cpu() for name, each in objects.items()}, tuple(size), tuple(on_canvas))
            for objects, size, on_canvas in zip(self.detect(batch), *sizes, strict=True)
        ]

    @contextmanager
    def writing(self, source: Source, out: Path) -> Iterator[Write[Found]]:
        """Write a list with an entry for each object: image_id, category_id, bbox, score, segmentation as RLE, and
        beside what COCO asks for the file_name of the image."""
        number = _image_ids(source)
        with whole_file(out) as file:
            separator = "[\n"

            def write(i: int, found: Found | None) -> None:
                nonlocal separator
                if found is None:
                    return
                for row in as_rows(found.objects, number(i), self.categories, found.size, found.on_canvas):
                    name = os.path.basename(source.path(i))
                    file.write(separator + json.dumps(row | {"file_name": name}))
                    separator = ",\n"

            yield write
            file.write("[]\n" if separator == "[\n" else "\n]\n")

    def drawn(self, image: Tensor, found: Found) -> Image.Image:
        height, width = found.on_canvas
        names = names_of(self.categories)
        return Image.fromarray(drawing.detected(image[:height, :width], found.objects, names).numpy())


def _image_ids(source: Source) -> Callable[[int], int]:
    """Return the image_id of each sample: the number that is its file's name, as in COCO, or, where one is no number
    or two are the same, its position from 1."""
    stems = [os.path.splitext(os.path.basename(source.path(i)))[0] for i in range(len(source))]
    numbers = [int(stem) if stem.isascii() and stem.isdecimal() else None for stem in stems]
    if None in numbers or len(set(numbers)) < len(numbers):
        return lambda i: i + 1
    return lambda i: numbers[i]  # type: ignore[return-value]
