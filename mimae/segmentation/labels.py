"""Conversion of the values in a mask to classes.

Letters in shapes: h, w an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mimae.data.pixels.decode import BadImage
from mimae.errors import UserError
from mimae.segmentation.settings import LARGEST_ID, SegmentSettings

IGNORED = -1
"""Class of the pixels that are ignored in training and evaluation."""

_UNKNOWN = -2


@dataclass(frozen=True)
class Labels:
    """The classes, and their values in masks."""

    settings: SegmentSettings

    @classmethod
    def of(cls, settings: SegmentSettings) -> Labels:
        """Return the labels of the settings. Raises UserError if the settings have no classes."""
        if settings.classes is None:
            raise UserError("segment.classes=null: it has to be the number of classes, or the list of their names")
        return cls(settings)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes in order."""
        return self.settings.names

    @cached_property
    def table(self) -> np.ndarray:
        """int16 (65536,): the class of each value."""
        table = np.full(LARGEST_ID + 1, _UNKNOWN, np.int16)
        table[list(self.settings.ignore)] = IGNORED
        for number, values in enumerate(self.settings.values()):
            table[list(values)] = number
        return table

    def classes(self, values: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, int16 (h, w), given the integer values (h, w) of a mask.

        Raises BadImage for values that belong to no class.
        """
        outside = (values < 0) | (values > LARGEST_ID)
        found = self.table[np.where(outside, 0, values)]
        found[outside] = _UNKNOWN
        if (strange := found == _UNKNOWN).any():
            several = np.unique(values[strange])
            shown = ", ".join(map(str, several[:5].tolist())) + ", ..." * (len(several) > 5)
            raise BadImage(
                f"{strange.sum()} pixels have values that are no class: {shown}; legal are {self._legal()}, and "
                f"segment.ignore={list(self.settings.ignore)}"
            )
        return found

    def _legal(self) -> str:
        values = [value for values in self.settings.values() for value in values]
        if values == list(range(values[0], values[-1] + 1)):
            return f"{values[0]} to {values[-1]}"
        return ", ".join(map(str, values[:8])) + ", ..." * (len(values) > 8)
