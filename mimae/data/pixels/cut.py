"""From stored pixels to a sample: the region to cut out, the resize, and the turn that makes it upright."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mimae.data.pixels.augment import Window


class Turn(NamedTuple):
    """Operations that make pixels upright: reverse the rows, reverse the columns, then transpose."""

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
"""Turn for each EXIF orientation."""


class Cut(NamedTuple):
    """A sample in stored pixels: its rectangle, and the turn to apply to the pixels that were cut out."""

    window: Window
    turn: Turn

    def scale(self, size: tuple[int, int]) -> int:
        """Return the largest scale at which the rectangle still has twice the sides of a sample of `size`; at least 1.

        The resize to the sample then still averages at least two pixels in each direction.
        """
        rows, columns = size[::-1] if self.turn.swap else size
        fitting = (s for s in (8, 4, 2) if self.window.height >= 2 * s * rows and self.window.width >= 2 * s * columns)
        return next(fitting, 1)

    def scaled(self, scale: int) -> Window:
        """Return the rectangle in the image at 1/scale of its size, with corners at the nearest pixels."""
        top, left, height, width = self.window
        bottom, right = ((end + scale // 2) // scale for end in (top + height, left + width))
        top, left = ((start + scale // 2) // scale for start in (top, left))
        return Window(top, left, max(1, bottom - top), max(1, right - left))


def cut_from(
    height: int, width: int, orientation: int, window: Callable[[int, int], Window], *, flip: bool = False
) -> Cut:
    """Return the cut from a stored image of height x width pixels. `window` gives the window in the upright image.

    With `flip` the upright sample is mirrored left to right.
    """
    rows, columns, swap = _TURNS[orientation]
    top, left, h, w = window(width, height) if swap else window(height, width)
    if swap:
        top, left, h, w = left, top, w, h
    place = Window(height - top - h if rows else top, width - left - w if columns else left, h, w)
    # If the sides are swapped, columns of the upright sample are rows of the stored one.
    return Cut(place, Turn(rows ^ (flip and swap), columns ^ (flip and not swap), swap))


def finish(region: Tensor, size: tuple[int, int], turn: Turn) -> Tensor:
    """Resize a stored region uint8 (h, w, 3), then turn it: the sample uint8 (*size, 3).

    The resize is torch's bicubic, antialiased one on integers.
    """
    if turn.swap:
        size = size[::-1]
    # torch resizes this "channels last" view without a copy.
    nhwc = torch.nn.functional.interpolate(region[None].permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    pixels = nhwc[0].permute(1, 2, 0)
    mirrored = [axis for axis, wanted in enumerate((turn.rows, turn.columns)) if wanted]
    if mirrored:
        pixels = pixels.flip(mirrored)
    return pixels.transpose(0, 1) if turn.swap else pixels
