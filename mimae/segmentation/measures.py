"""Measures of segmentation: intersection over union of each class, and pixel accuracy, from a confusion matrix.

Letters in shapes: C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mimae.segmentation.labels import IGNORED


def confusion(classes: Tensor, found: Tensor, number: int) -> Tensor:
    """Return the number of pixels by true class (row) and predicted class (column), int64 (C, C).

    Ignored pixels are left out.
    """
    counted = classes != IGNORED
    pairs = classes[counted].long() * number + found[counted]
    return torch.bincount(pairs, minlength=number * number).view(number, number)


class Evaluation(NamedTuple):
    """The result of a model on images with masks."""

    confusion: Tensor
    """int64 (C, C) on the CPU, see `confusion`."""
    images: int
    left_out: int
    """Number of images that could not be read, or whose masks could not."""

    @property
    def per_class(self) -> list[float | None]:
        """Intersection over union of each class; None for a class that is neither annotated nor predicted anywhere."""
        both = self.confusion.diagonal()
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        return [b / e if e else None for b, e in zip(both.tolist(), either.tolist())]

    @property
    def miou(self) -> float:
        """Mean intersection over union of the classes that have a value; NaN if none has."""
        values = [value for value in self.per_class if value is not None]
        return sum(values) / len(values) if values else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels whose predicted class is right; NaN if there are no pixels."""
        pixels = int(self.confusion.sum())
        return int(self.confusion.diagonal().sum()) / pixels if pixels else float("nan")

    @property
    def absent(self) -> list[int]:
        """The classes that no pixel is annotated with."""
        return (self.confusion.sum(1) == 0).nonzero()[:, 0].tolist()
