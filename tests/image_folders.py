"""Folders of images with two classes, for tests that train."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def two_classes(folder: Path, images: Iterable[np.ndarray]) -> Path:
    """Write images (H, W, 3) uint8 as PNG files, alternately of the classes a and b, and return the folder."""
    for i, pixels in enumerate(images):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:02}.png")
    return folder


def noise(count: int, seed: int) -> Iterable[np.ndarray]:
    """Return images of noise, 16 pixels high and 14 to 20 wide."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (16, 14 + i % 7, 3), dtype=np.uint8) for i in range(count)]
