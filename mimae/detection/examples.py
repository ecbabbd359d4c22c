"""Examples of detection: an image on a canvas of one size, with the boxes, classes and masks of its objects.

In training the image is scaled at random, cut or padded to the canvas (large-scale jitter), and mirrored with
probability 0.5. In evaluation it is scaled to fit. Image, boxes and masks have the same geometry, which is a pure
function of (seed, epoch, sample id).

Letters in shapes: H, W the canvas, M the largest number of objects.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mimae.data.loading.examples import Example
from mimae.data.pixels.augment import Window, below
from mimae.data.pixels.decode import BadImage, Encoded, region
from mimae.data.settings import DataSettings
from mimae.detection.coco import Coco
from mimae.detection.settings import DetectSettings
from mimae.randomness import Purpose, uniform, words


class Placing(NamedTuple):
    """The placing of an image on the canvas: it is scaled to `height` x `width`, shifted by (-top, -left), mirrored."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


def fitted(size: tuple[int, int], canvas: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Return the size (height, width) of an image at `scale`; at scale 1 it just fits into the canvas."""
    ratio = scale * min(canvas[0] / size[0], canvas[1] / size[1])
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def jittered(
    seed: int, epoch: int, sample_id: int, size: tuple[int, int], canvas: tuple[int, int], settings: DetectSettings
) -> Placing:
    """Return the random placing of a training image of `size` (height, width)."""
    drawn = words(seed, Purpose.AUGMENT, epoch, torch.tensor([sample_id]), 4)[0]
    low, high = settings.scale
    height, width = fitted(size, canvas, low + (high - low) * uniform(drawn[:1]).item())
    top = below(int(drawn[1]), max(height - canvas[0], 0) + 1)
    left = below(int(drawn[2]), max(width - canvas[1], 0) + 1)
    return Placing(height, width, top, left, int(drawn[3]) < 1 << 31)


class FittedReader:
    """Reads images that are scaled to fit onto the canvas, without objects."""

    def __init__(self, data: DataSettings) -> None:
        self.canvas, self.flips = data.size_hw, data.flip
        self.paper = [round(255 * mean) for mean in data.mean]

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        pixels = _pixels(encoded)
        return self._example(pixels, Placing(*fitted(pixels.shape[:2], self.canvas), 0, 0, False))

    def _example(self, pixels: np.ndarray, placing: Placing) -> Example:
        """Return the canvas, uint8 (H, W, 3), the size (height, width) of the image on it, and that in the file."""
        scaled = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [placing.height, placing.width], antialias=True)
        cut = self._cut(scaled, placing)
        canvas = torch.tensor(self.paper, dtype=torch.uint8).expand(*self.canvas, 3).clone()
        height, width = cut.shape[-2:]
        canvas[:height, :width] = cut.permute(1, 2, 0)
        return Example(canvas, {"size": torch.tensor((height, width)), "source_size": torch.tensor(pixels.shape[:2])})

    def _cut(self, planes: Tensor, placing: Placing) -> Tensor:
        """Return the part of scaled planes (..., h, w) that is on the canvas."""
        bottom, right = placing.top + self.canvas[0], placing.left + self.canvas[1]
        cut = planes[..., placing.top : bottom, placing.left : right]
        return cut.flip(-1) if placing.flip else cut


class DetectionReader(FittedReader):
    """Makes the examples of a COCO set; without a seed, those of evaluation."""

    def __init__(self, coco: Coco, data: DataSettings, settings: DetectSettings, seed: int | None) -> None:
        super().__init__(data)
        self.coco, self.settings, self.seed = coco, settings, seed

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        objects = self.coco.objects[source_id]
        pixels = _pixels(encoded)
        if pixels.shape[:2] != (objects.height, objects.width):
            raise BadImage(
                f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, but its annotation has "
                f"{objects.width} x {objects.height}"
            )
        if self.seed is None:
            if self.settings.masks:
                # An image whose masks cannot be drawn is left out, instead of an error when all images are done.
                deque(self.coco.masks(source_id, np.arange(len(objects.boxes))), maxlen=0)
            return self._example(pixels, Placing(*fitted(pixels.shape[:2], self.canvas), 0, 0, False))
        placing = jittered(self.seed, epoch, sample_id, pixels.shape[:2], self.canvas, self.settings)
        placing = placing._replace(flip=placing.flip and self.flips)
        image, sizes = self._example(pixels, placing)
        height, width = sizes["size"].tolist()
        return Example(image, sizes | self._targets(source_id, placing, (height, width)))

    def _targets(self, i: int, placing: Placing, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return boxes (M, 4), classes (M,) from 1 on, their count, and masks packed to bits (M, H, W / 8)."""
        objects, most = self.coco.objects[i], self.settings.max_objects
        boxes = objects.boxes * np.tile([placing.width / objects.width, placing.height / objects.height], 2) - np.tile(
            [placing.left, placing.top], 2
        )
        if placing.flip:
            boxes = np.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], 1)
        boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2))
        # A box with a side below one pixel has no positive anchor and no mask.
        usable = ~objects.crowd & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        areas = np.where(usable, (boxes[:, 2:] - boxes[:, :2]).prod(1), -1)
        chosen = np.sort(np.argsort(-areas, kind="stable")[: min(most, int(usable.sum()))])
        found = {"boxes": torch.zeros(most, 4), "classes": torch.zeros(most, dtype=torch.int64)}
        if self.settings.masks:
            masks, bits = self._masks(i, chosen, placing)
            visible = masks.any(axis=(1, 2))
            # The box of an object encloses the part of it that is on the canvas.
            boxes[chosen[visible]] = _boxes_of(masks[visible])
            chosen, bits = chosen[visible], bits[visible]
            found["masks"] = torch.zeros(most, self.canvas[0], -(-self.canvas[1] // 8), dtype=torch.uint8)
            found["masks"][: len(bits)] = torch.from_numpy(bits)
        found["boxes"][: len(chosen)] = torch.from_numpy(boxes[chosen]).float()
        found["classes"][: len(chosen)] = torch.from_numpy(objects.classes[chosen]) + 1
        return found | {"count": torch.tensor(len(chosen))}

    def _masks(self, i: int, chosen: np.ndarray, placing: Placing) -> tuple[np.ndarray, np.ndarray]:
        """Return the masks of objects on the canvas, bool (n, H, W), and packed to bits (n, H, W / 8)."""
        masks = np.zeros((len(chosen), *self.canvas), bool)
        for mask, whole in zip(masks, self.coco.masks(i, chosen), strict=True):
            plane = torch.from_numpy(whole).byte()[None]
            scaled = F.resize(plane, [placing.height, placing.width], F.InterpolationMode.NEAREST)[0]
            cut = self._cut(scaled, placing)
            mask[: cut.shape[0], : cut.shape[1]] = cut.numpy()
        return masks, np.packbits(masks, axis=2)


def _pixels(encoded: Encoded) -> np.ndarray:
    """Return an image, upright, uint8 (h, w, 3). Raises BadImage."""
    return region(encoded, lambda height, width: Window(0, 0, height, width))


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """Return the tight boxes (n, 4) of masks (n, H, W), each with at least one pixel."""
    rows, columns = masks.max(2), masks.max(1)

    def ends(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)

    (top, bottom), (left, right) = ends(rows), ends(columns)
    return np.stack([left, top, right, bottom], 1)


def unpacked(bits: Tensor, width: int) -> Tensor:
    """Unpack bits uint8 (n, H, W / 8) to masks uint8 (n, H, W)."""
    shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :width]
