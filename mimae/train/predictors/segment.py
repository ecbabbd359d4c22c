"""The class of each pixel of images, as a mask for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimae.data.loading.batch import Batch
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.segmentation import overlays
from mimae.segmentation.examples import Unmasked
from mimae.segmentation.labels import Labels
from mimae.segmentation.windows import classes_at
from mimae.telemetry import pictures
from mimae.train.predictors.base import Names, Predictor, Write, new_folder


class MaskPredictor(Predictor[Tensor]):
    """Finds the class of each pixel, int64 (h, w) of the size of the image in its file."""

    out = "a folder of masks"
    options = frozenset({"overlays"})

    def __init__(self, labels: Labels, logits: Callable[[Tensor], Tensor], data: DataSettings) -> None:
        """`logits` maps an image uint8 (h, w, 3) at scale 1 to (C, h, w)."""
        self.labels, self.logits, self.reader = labels, logits, Unmasked(data)

    def find(self, batch: Batch) -> list[Tensor]:
        height, width = batch.targets["size"][0].tolist()
        return [classes_at(self.logits(batch.images[0]), (height, width)).cpu()]

    @contextmanager
    def writing(self, source: Source, out: Path) -> Iterator[Write[Tensor]]:
        """Write a PNG for each image that can be read, whose pixels have the values that the classes have in masks."""
        new_folder("--out", out)
        names = Names(source)
        values = np.array([values[0] for values in self.labels.settings.values()])

        def write(i: int, found: Tensor | None) -> None:
            if found is not None:
                file = out / names.of(i, ".png")
                file.parent.mkdir(parents=True, exist_ok=True)
                _mask(values[found.numpy()], values).save(file)

        yield write

    def drawn(self, image: Tensor, found: Tensor) -> Image.Image:
        size = (image.shape[0], image.shape[1])
        classes = torch.nn.functional.interpolate(found[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        names = self.labels.names
        coloured, _ = pictures.readable(overlays.overlay(image[None], classes[None], len(names))[0])
        return overlays.with_legend(Image.fromarray(coloured.numpy()), classes.unique().tolist(), names)


def _mask(pixels: np.ndarray, values: np.ndarray) -> Image.Image:
    """Return a picture whose pixels are numbers: with the colours of the classes as its palette, where 8 bits hold
    them."""
    if values.max() > 255:
        return Image.fromarray(pixels.astype(np.uint16))
    mask = Image.fromarray(pixels.astype(np.uint8), "L").convert("P")
    palette = np.zeros((256, 3), np.uint8)
    palette[values] = pictures.colours(len(values))
    mask.putpalette(palette.tobytes())
    return mask
