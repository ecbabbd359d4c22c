"""Examples of segmentation: a window of an image and the class of each of its pixels.

In training the image is scaled at random, a window of data.image_size is cut out and mirrored with probability 0.5, and
its colours are changed. Image and mask have the same geometry, which is a pure function of (seed, epoch, sample id).

Letters in shapes: h, w an image; H, W a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mimae.data.loading.examples import Example
from mimae.data.pixels.augment import Window, below
from mimae.data.pixels.decode import Encoded, region
from mimae.data.settings import DataSettings
from mimae.randomness import Purpose, uniform, words
from mimae.segmentation.labels import IGNORED
from mimae.segmentation.masks import Masks
from mimae.segmentation.settings import SegmentSettings

TRIES = 11
"""Maximal number of windows that are drawn until no class has too large a share. The last one is used anyway."""

LONGEST = 4
"""Largest side of an image at scale 1, in sides of the window. More elongated images are scaled down and padded."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, (0.5, 1.5), (0.5, 1.5), 18 / 180
"""Ranges of the photometric changes: an offset for values in [0, 1], two factors, and a share of the hue circle. Each
change is made with probability 0.5 (SSD's recipe, which mmsegmentation uses)."""

_WORDS = 2 + 2 * TRIES + 8


class Pair(NamedTuple):
    """An image and the classes of its pixels."""

    image: Tensor
    """uint8 (3, h, w)."""
    classes: Tensor
    """int16 (h, w)."""


def covering(size: tuple[int, int], window: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Return the size (height, width) of an image at `scale`; scale 1 is the smallest that covers the window.

    An image whose longer side would exceed `LONGEST` windows is scaled down, so that it does not cover the window.
    """
    down, across = window[0] / size[0], window[1] / size[1]
    ratio = scale * min(max(down, across), LONGEST * min(down, across))
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


class Reader:
    """Reader of pairs of image and mask."""

    def __init__(self, masks: Masks, data: DataSettings) -> None:
        self.masks, self.window = masks, data.size_hw
        self.paper = torch.tensor([round(255 * mean) for mean in data.mean], dtype=torch.uint8)

    def pair(self, encoded: Encoded, source_id: int) -> Pair:
        """Return an upright image and its classes. Raises BadImage if one of them cannot be read."""
        image = _planes(encoded)
        classes = self.masks.classes(source_id, (image.shape[1], image.shape[2]))
        return Pair(image, torch.from_numpy(classes))

    def scaled(self, pair: Pair, scale: float) -> Pair:
        """Return a pair at a scale, padded to the size of the window if it is smaller."""
        size = list(covering((pair.image.shape[1], pair.image.shape[2]), self.window, scale))
        image = F.resize(pair.image, size, InterpolationMode.BILINEAR, antialias=True)
        classes = F.resize(pair.classes[None].float(), size, InterpolationMode.NEAREST_EXACT)[0].short()
        return Pair(padded(image, self.window, self.paper), padded_classes(classes, self.window))


def padded(image: Tensor, window: tuple[int, int], paper: Tensor) -> Tensor:
    """Pad an image (3, h, w) below and to the right with the colour `paper` (3,), if it is smaller than the window."""
    height, width = image.shape[1:]
    canvas = paper.to(image.device)[:, None, None].expand(3, max(height, window[0]), max(width, window[1])).clone()
    canvas[:, :height, :width] = image
    return canvas


def padded_classes(classes: Tensor, window: tuple[int, int]) -> Tensor:
    """Pad classes (h, w) with `IGNORED` where an image is padded."""
    below, right = (max(0, side - own) for side, own in zip(window, classes.shape))
    return functional.pad(classes, (0, right, 0, below), value=IGNORED)


class Jittered(Reader):
    """Reader of training windows."""

    def __init__(self, masks: Masks, data: DataSettings, settings: SegmentSettings, seed: int) -> None:
        super().__init__(masks, data)
        self.settings, self.flips, self.seed = settings, data.flip, seed

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        drawn = words(self.seed, Purpose.AUGMENT, epoch, torch.tensor([sample_id]), _WORDS)[0]
        low, high = self.settings.scale
        pair = self.scaled(self.pair(encoded, source_id), low + (high - low) * uniform(drawn[:1]).item())
        image, classes = self._window(pair, drawn[2 : 2 + 2 * TRIES].tolist())
        if self.flips and drawn[1] < 1 << 31:
            image, classes = image.flip(-1), classes.flip(-1)
        if self.settings.photometric:
            image = photometric(image, drawn[-8:])
        return Example(image.permute(1, 2, 0).contiguous(), {"classes": classes.contiguous()})

    def _window(self, pair: Pair, drawn: list[int]) -> Pair:
        """Return a random window with several classes, none of which has more than the largest allowed share."""
        height, width = self.window
        most = self.settings.max_class_share
        for i in range(TRIES):
            top = below(drawn[2 * i], pair.classes.shape[0] - height + 1)
            left = below(drawn[2 * i + 1], pair.classes.shape[1] - width + 1)
            classes = pair.classes[top : top + height, left : left + width]
            counts = torch.bincount(classes[classes >= 0].long())
            if most == 1 or ((counts > 0).sum() > 1 and counts.max() < most * counts.sum()):
                break
        return Pair(pair.image[:, top : top + height, left : left + width], classes)


def photometric(image: Tensor, drawn: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image uint8 (3, h, w), each with probability 0.5.

    `drawn` has 8 random words.
    """
    is_on = (drawn[:4] < 1 << 31).tolist()
    at = (2 * uniform(drawn[4:]) - 1).tolist()
    if is_on[0]:
        image = (image.short() + round(255 * BRIGHTNESS * at[0])).clamp(0, 255).byte()
    if is_on[1]:
        image = F.adjust_contrast(image, _between(*CONTRAST, at[1]))
    if is_on[2]:
        image = F.adjust_saturation(image, _between(*SATURATION, at[2]))
    return F.adjust_hue(image, HUE * at[3]) if is_on[3] else image


def _between(low: float, high: float, at: float) -> float:
    """Return the point of the range at position `at`, from -1 (low) to 1 (high)."""
    return (low + high) / 2 + (high - low) / 2 * at


class Central(Reader):
    """Reader of the central window of an image at scale 1, for pictures."""

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        image, classes = self.scaled(self.pair(encoded, source_id), 1.0)
        (height, width), (rows, columns) = self.window, classes.shape
        top, left = (rows - height) // 2, (columns - width) // 2
        cut = image[:, top : top + height, left : left + width]
        classes = classes[top : top + height, left : left + width]
        return Example(cut.permute(1, 2, 0).contiguous(), {"classes": classes.contiguous()})


class Whole(Reader):
    """Reader of whole images at scale 1, and of their classes at the size of the file. A batch has one image."""

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        image, classes = self.pair(encoded, source_id)
        return Example(_at_scale_1(image, self.window), {"classes": classes})


class Unmasked:
    """Reads whole images at scale 1 that have no mask, and the size that they have in the file; a batch has one."""

    def __init__(self, data: DataSettings) -> None:
        self.window = data.size_hw

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        image = _planes(encoded)
        return Example(_at_scale_1(image, self.window), {"size": torch.tensor(image.shape[1:])})


def _planes(encoded: Encoded) -> Tensor:
    """Return an image, upright, uint8 (3, h, w). Raises BadImage."""
    pixels = region(encoded, lambda height, width: Window(0, 0, height, width))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _at_scale_1(image: Tensor, window: tuple[int, int]) -> Tensor:
    """Return an image (3, h, w) at scale 1, (h', w', 3)."""
    size = list(covering((image.shape[1], image.shape[2]), window))
    return F.resize(image, size, InterpolationMode.BILINEAR, antialias=True).permute(1, 2, 0).contiguous()
