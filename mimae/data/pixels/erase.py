"""Random erasing (Zhong et al. 2017): a rectangle of an image becomes noise, as timm's mode `pixel` has it.

Letters in shapes: B images, H rows, W columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mimae.randomness import Purpose, normal, uniform, words

AREA = (0.02, 1 / 3)
"""Least and largest area of the rectangle, as a share of the image's."""

_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
_ATTEMPTS = 10
_NOISE = 64
"""First word of the noise; the words before it choose the rectangle."""


def rectangles(seed: int, epoch: int, sample_ids: Tensor, share: float, size: tuple[int, int]) -> Tensor:
    """Return top, bottom, left and right of what is erased of each sample, int64 (B, 4); zeros where nothing is.

    Word 0 decides whether; words 1 + 4 t to 4 + 4 t are area, height / width, top and left of attempt t. The first
    rectangle that is smaller than the image is taken.
    """
    height, width = size
    drawn = uniform(words(seed, Purpose.ERASE, epoch, sample_ids, 1 + 4 * _ATTEMPTS))
    areas, ratios, tops, lefts = drawn[:, 1:].unflatten(1, (_ATTEMPTS, 4)).unbind(2)
    areas = height * width * (AREA[0] + (AREA[1] - AREA[0]) * areas)
    ratios = torch.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratios)
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (heights < height) & (widths < width)
    tops, lefts = (tops * (height - heights + 1)).floor(), (lefts * (width - widths + 1)).floor()
    tried = torch.stack([tops, tops + heights, lefts, lefts + widths], 2).long()
    first = fits.long().argmax(1)
    chosen = tried[torch.arange(len(tried), device=tried.device), first]
    return chosen * (fits.any(1) & (drawn[:, 0] < share))[:, None]


def erase(images: Tensor, seed: int, epoch: int, sample_ids: Tensor, share: float) -> Tensor:
    """images (B, H, W, 3), normalised -> the same with a rectangle of standard normal noise in `share` of them."""
    height, width = images.shape[1:3]
    top, bottom, left, right = rectangles(seed, epoch, sample_ids, share, (height, width)).T[..., None, None]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    noise = normal(uniform(words(seed, Purpose.ERASE, epoch, sample_ids, 3 * height * width, _NOISE)))
    return torch.where(inside[..., None], noise.view(images.shape).to(images.dtype), images)
