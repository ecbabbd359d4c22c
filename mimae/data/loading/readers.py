"""Readers of images alone: cropped as the settings say and augmented, or the window that is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mimae.data.loading.backend import require
from mimae.data.loading.examples import Example
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.samples import Sample, cuts, region_of
from mimae.data.pixels.augment import Window, centre_window
from mimae.data.pixels.cut import finish
from mimae.data.pixels.decode import Encoded
from mimae.data.pixels.rand_augment import RandAugment
from mimae.data.settings import DataSettings
from mimae.randomness import Purpose, words


def _pixels(
    settings: DataSettings,
    encoded: Encoded,
    window: Callable[[int, int], Window],
    flip: bool,
    scale_to: tuple[int, int] | None = None,
) -> Tensor:
    """Return a window of an image, uint8 (H, W, 3), of the size of the settings; see `region_of` for `scale_to`."""
    region, turn = region_of(Sample(0, encoded, window, flip), scale_to)
    return finish(region, settings.size_hw, turn).contiguous()


class Augmented:
    """Reads training images: the crop and the flip of the settings, then RandAugment.

    Raises DataError if data.decode=scaled is not possible here.
    """

    def __init__(self, settings: DataSettings, seed: int, augment: RandAugment) -> None:
        require("torch", settings)
        self.settings, self.seed, self.augment = settings, seed, augment

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        ids = np.array([sample_id])
        ((window, flip),) = cuts(self.settings, self.seed, BatchRequest(epoch, 0, ids))
        scale_to = self.settings.size_hw if self.settings.decode == "scaled" else None
        pixels = _pixels(self.settings, encoded, window, flip, scale_to)
        drawn = words(self.seed, Purpose.AUGMENT, epoch, torch.from_numpy(ids), 2)[0].tolist()
        return Example(torch.from_numpy(self.augment(pixels.numpy(), drawn).copy()), {})


class Central:
    """Reads the central window of an image, whose sides are `share` of the largest one's."""

    def __init__(self, settings: DataSettings, share: float) -> None:
        self.settings, self.window = settings, partial(centre_window, size=settings.size_hw, share=share)

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        return Example(_pixels(self.settings, encoded, self.window, False), {})
