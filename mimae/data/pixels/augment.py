"""Crop windows and flips: pure functions of (seed, epoch, sample_id) and the image's size."""

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
    """A rectangle of an image, in pixels of the upright image."""

    top: int
    left: int
    height: int
    width: int


def crop_words(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """Return the random words that `random_window` uses for the samples `ids` (B,): int64 (B, 40)."""
    return words(seed, Purpose.CROP, epoch, ids, 4 * ATTEMPTS)


def flips(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """Return which of the samples `ids` (B,) are flipped horizontally: bool (B,)."""
    return words(seed, Purpose.FLIP, epoch, ids, 1)[:, 0] < 1 << 31


def random_window(words: Sequence[int], height: int, width: int, scale: tuple[float, float]) -> Window:
    """Return RandomResizedCrop's window in an image of height x width pixels (torchvision's algorithm).

    The area as a fraction of the image's area is uniform in `scale`, width / height is log-uniform in [3/4, 4/3], and
    the position is uniform. Attempt t uses words 4t to 4t + 3 for area, ratio, top and left. After ten attempts that
    do not fit, the window is the largest central one with a ratio in this range.
    """
    for attempt in range(ATTEMPTS):
        area_word, ratio_word, top_word, left_word = words[4 * attempt : 4 * attempt + 4]
        area = height * width * _between(area_word, *scale)
        ratio = math.exp(_between(ratio_word, *_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Window(below(top_word, height - h + 1), below(left_word, width - w + 1), h, w)
    return _centred(height, width, min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1])))


def centre_window(height: int, width: int, size: tuple[int, int], share: float = 1.0) -> Window:
    """Return the central window of an image with the aspect ratio of `size` (height, width), whose sides are `share`
    of the largest one's."""
    out_h, out_w = size
    return _centred(
        height,
        width,
        max(1, round(share * min(height, round(width * out_h / out_w)))),
        max(1, round(share * min(width, round(height * out_w / out_h)))),
    )


def below(word: int, n: int) -> int:
    """Map a random 32-bit word to an integer in [0, n)."""
    return (word * n) >> 32


def _centred(height: int, width: int, h: int, w: int) -> Window:
    return Window((height - h) // 2, (width - w) // 2, h, w)


def _between(word: int, low: float, high: float) -> float:
    return low + (high - low) * (word + 0.5) / 2**32
