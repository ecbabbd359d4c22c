"""A sample's way from stored pixels to its own: where it lies in them, how it is resized, turned and mirrored."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mimae.data.pixels.augment import Window


class Turn(NamedTuple):
    """Makes pixels upright: the last row first, the last column first, then rows and columns exchanged."""

    rows: bool = False
    columns: bool = False
    swap: bool = False


_TURNS = {
    1: Turn(),
    2: Turn(columns=True),
    3: Turn(rows=True, columns=True),
    4: Turn(rows=True),
    5: Turn(swap=True),
    6: Turn(rows=True, swap=True),
    7: Turn(rows=True, columns=True, swap=True),
    8: Turn(columns=True, swap=True),
}
"""By EXIF orientation."""


class Cut(NamedTuple):
    """A sample in pixels that lie as they are stored: its rectangle there, and how what was cut is turned."""

    window: Window
    turn: Turn


def cut_from(
    height: int, width: int, orientation: int, window: Callable[[int, int], Window], *, flip: bool = False
) -> Cut:
    """The cut of `window(height, width)`, which is for the upright image, from a stored one of height x width pixels.

    A flip mirrors the upright sample left to right.
    """
    rows, columns, swap = _TURNS[orientation]
    top, left, h, w = window(width, height) if swap else window(height, width)
    if swap:
        top, left, h, w = left, top, w, h
    place = Window(height - top - h if rows else top, width - left - w if columns else left, h, w)
    # Columns of the upright sample are rows of the stored one where the sides are exchanged.
    return Cut(place, Turn(rows ^ (flip and swap), columns ^ (flip and not swap), swap))


def finish(region: Tensor, size: tuple[int, int], turn: Turn) -> Tensor:
    """A region uint8 (h, w, 3) as it is stored -> the sample uint8 (*size, 3): resized, then turned.

    The resize is torch's on integers, bicubic and antialiased.
    """
    if turn.swap:
        size = size[::-1]
    # Of this form of "channels last" torch resizes without a copy.
    nhwc = torch.nn.functional.interpolate(region[None].permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    pixels = nhwc[0].permute(1, 2, 0)
    mirrored = [axis for axis, wanted in enumerate((turn.rows, turn.columns)) if wanted]
    if mirrored:
        pixels = pixels.flip(mirrored)
    return pixels.transpose(0, 1) if turn.swap else pixels
