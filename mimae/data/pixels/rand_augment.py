"""RandAugment as MAE's fine-tuning uses it: timm's `rand-m9-mstd0.5-inc1`, drawn from a sample's own stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform


class RandAugment:
    """Two of timm's 15 operations, each with probability 1/2, whose magnitude is normal around `magnitude` and clipped
    to [0, 10]; what lies outside of the image has the colour `mean`."""

    def __init__(self, magnitude: float, std: float, mean: Sequence[float], size: tuple[int, int]) -> None:
        """`mean`: of red, green and blue in [0, 1]; `size`: height and width of the images."""
        fill = tuple(min(255, round(255 * channel)) for channel in mean)
        hparams = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_std": std,
        }
        self.transform: Any = rand_augment_transform("rand-inc1", hparams)
        for op in self.transform.ops:
            op.magnitude = magnitude
            if op.name == "PosterizeIncreasing":
                op.aug_fn = _posterize

    def __call__(self, pixels: np.ndarray, words: Sequence[int]) -> np.ndarray:
        """uint8 (H, W, 3) -> the same, by two random words. timm draws from `random` and `numpy.random`: both are
        seeded, and then as they were before."""
        before = random.getstate(), np.random.get_state()
        random.seed(words[0])
        np.random.seed(words[1])
        try:
            return np.asarray(self.transform(Image.fromarray(pixels)))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each value. Magnitude 10 keeps none, which Pillow refuses from version 13 on; before it
    the image became black."""
    mask = 0xFF & ~(2 ** (8 - min(bits, 8)) - 1)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))
