"""Segmentation of an image of any size with overlapping windows.

Letters in shapes: h, w an image; H, W a window; C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae import distributed
from mimae.segmentation.examples import padded

BATCH = 8
"""Number of windows in a forward."""

_CLASSES = 16
"""Number of classes that are interpolated at a time; the logits of all would take gigabytes for a large photo."""


def corners(size: tuple[int, int], window: tuple[int, int], stride: float) -> list[tuple[int, int]]:
    """Return (top, left) of the windows that cover an image of `size`, which must not be smaller than a window.

    The distance of neighbouring windows is `stride` times a side. The last windows end at the image's border.
    """
    places = []
    for side, length in zip(size, window):
        step = max(1, round(stride * length))
        count = -(-max(side - length, 0) // step) + 1
        places.append([min(i * step, side - length) for i in range(count)])
    return [(top, left) for top in places[0] for left in places[1]]


def slide(
    logits: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], stride: float, paper: Tensor
) -> Tensor:
    """Return the logits fp32 (C, h, w) of an image uint8 (h, w, 3), averaged over all windows at each pixel.

    `logits` maps images (B, H, W, 3) to (B, C, H, W). It may be a collective, so all ranks call it equally often;
    therefore this function is a collective too, for one image on each rank. `paper` (3,) is the colour that pads images
    smaller than a window.
    """
    height, width = image.shape[:2]
    planes = padded(image.permute(2, 0, 1), window, paper).permute(1, 2, 0)
    size = (planes.shape[0], planes.shape[1])
    places = corners(size, window, stride)
    calls = -(-len(places) // BATCH)
    most = int(distributed.all_gather(torch.tensor([calls], device=image.device)).max())
    total, count = None, torch.zeros(size, device=image.device)
    for i in range(most):
        own = places[i * BATCH : (i + 1) * BATCH]
        cut = [planes[top : top + window[0], left : left + window[1]] for top, left in own or places[:1]]
        found = logits(torch.stack(cut)).float()
        if total is None:
            total = found.new_zeros(found.shape[1], *size)
        for (top, left), each in zip(own, found):
            total[:, top : top + window[0], left : left + window[1]] += each
            count[top : top + window[0], left : left + window[1]] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the best class of each pixel, int64 (*size), given logits (C, h, w), which are interpolated to `size`."""
    best = torch.full(size, -torch.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), _CLASSES):
        part = logits[None, first : first + _CLASSES]
        value, number = F.interpolate(part, size, mode="bilinear", align_corners=False)[0].max(0)
        is_better = value > best
        best, found = torch.where(is_better, value, best), torch.where(is_better, number + first, found)
    return found
