"""Where a sample is cut from its image: pure functions of (seed, epoch, sample_id) and its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mimae.randomness import Purpose, words

ATTEMPTS = 10
RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))


class Window(NamedTuple):
    """A rectangle of an image, in pixels of the image as seen upright."""

    top: int
    left: int
    height: int
    width: int


def crop_words(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """The words that `random_window` cuts the samples `ids` (B,) by: int64 (B, 40)."""
    return words(seed, Purpose.CROP, epoch, ids, 4 * ATTEMPTS)


def flips(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """Which of the samples `ids` (B,) are mirrored: bool (B,)."""
    return words(seed, Purpose.FLIP, epoch, ids, 1)[:, 0] < 1 << 31


def random_window(words: Sequence[int], height: int, width: int, scale: tuple[float, float]) -> Window:
    """RandomResizedCrop's window in an image of height x width pixels.

    The area is uniform in `scale` as a share of the image's, width / height log-uniform in 3/4 to 4/3, the
    place uniform. Attempt t takes words 4t to 4t + 3 for area, ratio, top and left; after ten that do not
    fit, the window is the largest central one of a legal ratio (torchvision's algorithm).
    """
    for attempt in range(ATTEMPTS):
        area_word, ratio_word, top_word, left_word = words[4 * attempt : 4 * attempt + 4]
        area = height * width * _between(area_word, *scale)
        ratio = math.exp(_between(ratio_word, *_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Window(below(top_word, height - h + 1), below(left_word, width - w + 1), h, w)
    return _centred(height, width, min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1])))


def centre_window(height: int, width: int, size: tuple[int, int]) -> Window:
    """The largest central window of an image with the shape of `size` (height, width)."""
    out_h, out_w = size
    return _centred(
        height,
        width,
        max(1, min(height, round(width * out_h / out_w))),
        max(1, min(width, round(height * out_w / out_h))),
    )


def below(word: int, n: int) -> int:
    """The word as an integer in [0, n)."""
    return (word * n) >> 32


def _centred(height: int, width: int, h: int, w: int) -> Window:
    return Window((height - h) // 2, (width - w) // 2, h, w)


def _between(word: int, low: float, high: float) -> float:
    return low + (high - low) * (word + 0.5) / 2**32
