"""Mixup and cutmix: neighbours in a batch, numbers 2 i and 2 i + 1, are mixed with each other.

One weight and one kind hold for a whole step (timm's mode `batch`); both come from the step's own stream. Neighbours
lie on one rank and in one micro-batch as long as these have an even number of images, so the result does not depend on
how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mimae.randomness import Purpose, uniform, words


class Mix(NamedTuple):
    """How the pairs of a step are mixed."""

    weight: float
    """Share of the image itself in pixels and label; the rest is its neighbour's."""
    box: tuple[int, int, int, int] | None = None
    """Cutmix: top, bottom, left and right of what comes from the neighbour. None: mixup."""

    def images(self, images: Tensor) -> Tensor:
        """images (B, H, W, 3), floating point -> mixed ones. B is even."""
        others = _neighbours(images)
        if self.box is None:
            return self.weight * images + (1 - self.weight) * others
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, top:bottom, left:right] = others[:, top:bottom, left:right]
        return mixed

    def labels(self, labels: Tensor) -> Tensor:
        """labels (B, C), a distribution for each image -> mixed ones."""
        return self.weight * labels + (1 - self.weight) * _neighbours(labels)


NONE = Mix(1.0)


class Settings(Protocol):
    """How batches are mixed."""

    @property
    def mix(self) -> float: ...  # share of the batches that are mixed
    @property
    def mixup(self) -> float: ...  # alpha, 0: none
    @property
    def cutmix(self) -> float: ...  # alpha, 0: none
    @property
    def cutmix_share(self) -> float: ...  # of the mixed batches, where both are on


def draw(seed: int, epoch: int, step: int, size: tuple[int, int], settings: Settings) -> Mix:
    """Return how the images of a step, of `size` (height, width), are mixed. On the host: the device is not asked."""
    stream = _stream(seed, epoch, step)
    is_mixed, is_cut, y, x = (next(stream) for _ in range(4))
    if is_mixed >= settings.mix or not (settings.mixup or settings.cutmix):
        return NONE
    if not settings.cutmix or (settings.mixup and is_cut >= settings.cutmix_share):
        return Mix(beta(settings.mixup, stream))
    height, width = size
    side = math.sqrt(1 - beta(settings.cutmix, stream))
    cut_h, cut_w = int(height * side), int(width * side)
    # Around any pixel: the part that lies outside of the image is lost, and the weight is what is left.
    y, x = int(y * height), int(x * width)
    top, bottom = max(y - cut_h // 2, 0), min(y + (cut_h + 1) // 2, height)
    left, right = max(x - cut_w // 2, 0), min(x + (cut_w + 1) // 2, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def beta(alpha: float, stream: Iterator[float]) -> float:
    """Return a number of Beta(alpha, alpha), 0 < alpha <= 1, from numbers uniform in (0, 1).

    Jöhnk's method: of pairs (u, v) the first for which u^(1/alpha) + v^(1/alpha) <= 1, half of them or more.
    """
    while True:
        log_u, log_v = math.log(next(stream)) / alpha, math.log(next(stream)) / alpha
        if math.exp(log_u) + math.exp(log_v) <= 1:
            # u^(1/alpha) / (u^(1/alpha) + v^(1/alpha)), where both may be too small for a float.
            return 1 / (1 + math.exp(min(log_v - log_u, 700)))


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """labels (B,) -> (B, classes): 1 at the label, with a share `smoothing` of it spread over all classes."""
    even = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return even.scatter_add_(1, labels[:, None], torch.full_like(even[:, :1], 1 - smoothing))


def _stream(seed: int, epoch: int, step: int) -> Iterator[float]:
    """Yield the uniform numbers of a step's stream."""
    first, count = 0, 32
    while True:
        yield from uniform(words(seed, Purpose.MIX, epoch, torch.tensor([step]), count, first))[0].tolist()
        first += count


def _neighbours(tensor: Tensor) -> Tensor:
    """Exchange rows 2 i and 2 i + 1."""
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
