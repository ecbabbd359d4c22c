"""Cutting stored pixels gives the same result as cutting the upright image, for each orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimae.data.pixels.augment import Window
from mimae.data.pixels.cut import Turn, cut_from, finish
from tests.data.conftest import photograph
from tests.data.pixels.test_decode import TURNED

UPRIGHT = photograph(0, 40, 60)


def region(pixels: np.ndarray, window: Window) -> torch.Tensor:
    top, left, height, width = window
    return torch.from_numpy(np.ascontiguousarray(pixels))[top : top + height, left : left + width]


@given(
    st.sampled_from(list(TURNED)),
    st.booleans(),
    st.tuples(st.integers(0, 39), st.integers(0, 59)),
    st.tuples(st.integers(1, 40), st.integers(1, 60)),
)
def test_the_same_pixels_as_from_the_upright_image(
    orientation: int, flip: bool, corner: tuple[int, int], shape: tuple[int, int]
) -> None:
    """Without a resize the pixels are exact: a window that is off by one row, or a wrong turn, changes the noise."""
    window = Window(*corner, min(shape[0], 40 - corner[0]), min(shape[1], 60 - corner[1]))
    sizes = []

    def draw(height: int, width: int) -> Window:
        sizes.append((height, width))
        return window

    stored = TURNED[orientation](UPRIGHT)
    cut = cut_from(stored.shape[0], stored.shape[1], orientation, draw, flip=flip)
    found = finish(region(stored, cut.window), (window.height, window.width), cut.turn)
    expected = region(UPRIGHT, window)
    assert sizes == [(40, 60)]
    assert torch.equal(found, expected.flip(1) if flip else expected)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("flip", [False, True])
def test_resized_before_it_is_turned(orientation: int, flip: bool) -> None:
    """A resize to a size that is not square, down in rows and up in columns, agrees up to rounding.

    torch rounds between its two passes, whose order is that of the stored sides.
    """
    window, size = Window(3, 5, 31, 22), (20, 32)
    stored = TURNED[orientation](UPRIGHT)
    cut = cut_from(stored.shape[0], stored.shape[1], orientation, lambda h, w: window, flip=flip)
    found = finish(region(stored, cut.window), size, cut.turn)
    expected = finish(region(UPRIGHT, window), size, Turn(columns=flip))
    difference = (found.int() - expected.int()).abs()
    assert found.shape == (20, 32, 3)
    assert difference.max() <= 2 and difference.float().mean() < 0.3
