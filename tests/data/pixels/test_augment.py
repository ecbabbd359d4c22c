"""Crop windows and flips: torchvision's algorithm, with counter-based random words instead of a generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop  # type: ignore[import-untyped]

from mimae.data.pixels.augment import ATTEMPTS, Window, centre_window, crop_words, flips, random_window

SIDES = st.integers(1, 5000)
WORDS = st.lists(st.integers(0, 2**32 - 1), min_size=4 * ATTEMPTS, max_size=4 * ATTEMPTS)


def inside(window: Window, height: int, width: int) -> bool:
    return (
        window.top >= 0
        and window.left >= 0
        and 1 <= window.height <= height - window.top
        and 1 <= window.width <= width - window.left
    )


@given(WORDS, SIDES, SIDES, st.sampled_from([(0.2, 1.0), (0.001, 0.002), (1.0, 1.0)]))
@example([2**32 - 1] * 4 * ATTEMPTS, 3, 4, (0.2, 1.0))  # The largest words give the last positions.
@example([0] * 4 * ATTEMPTS, 1, 1, (0.001, 0.002))  # The smallest area of the smallest image.
def test_window_lies_in_the_image(words: list[int], height: int, width: int, scale: tuple[float, float]) -> None:
    assert inside(random_window(words, height, width, scale), height, width)


@given(SIDES, SIDES, st.tuples(SIDES, SIDES))
def test_centre_window_touches_two_sides(height: int, width: int, size: tuple[int, int]) -> None:
    """The largest window of the wanted aspect ratio spans the image in one direction and is centred in the other."""
    window = centre_window(height, width, size)
    assert inside(window, height, width)
    assert window.height == height or window.width == width
    assert abs((height - window.height) - 2 * window.top) <= 1
    assert abs((width - window.width) - 2 * window.left) <= 1
    # The aspect ratio is right up to rounding of the shorter side.
    wanted = size[0] / size[1]
    assert abs(window.height - window.width * wanted) <= max(1.0, wanted) or min(window[2:]) == 1


def oracle(words: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> Window | None:
    """Return the first attempt that fits, or None; all ten are computed at once in NumPy."""
    area, ratio, top, left = (words.reshape(ATTEMPTS, 4).T + 0.5) / 2.0**32
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = (3 / 4) * (16 / 9) ** ratio
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((w <= width) & (h <= height) & (w > 0) & (h > 0))
    if not len(fits):
        return None
    t = fits[0]
    return Window(
        math.floor(top[t] * (height - h[t] + 1)),
        math.floor(left[t] * (width - w[t] + 1)),
        int(h[t]),
        int(w[t]),
    )


@pytest.mark.parametrize(
    ("height", "width"),
    [(375, 500), (100, 240), (64, 64)],  # A photograph, an image for which many attempts fail, a small square.
)
def test_windows_against_oracle(height: int, width: int) -> None:
    words = crop_words(9, 2, torch.arange(300))
    expected = [oracle(row, height, width, (0.2, 1.0)) for row in words.numpy()]
    found = [random_window(row, height, width, (0.2, 1.0)) for row in words.tolist()]
    assert [f for f, e in zip(found, expected) if e] == [e for e in expected if e]
    assert sum(e is not None for e in expected) > 250


@pytest.mark.parametrize(("height", "width"), [(30, 900), (900, 30), (7, 1000), (1, 3000)])
def test_fallback_is_torchvisions(height: int, width: int) -> None:
    """No window of 20 % or more fits into an extreme image, so every draw gives the central one."""
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.2, 1.0], [3 / 4, 4 / 3])
    words = crop_words(0, 0, torch.arange(5)).tolist()
    assert {random_window(row, height, width, (0.2, 1.0)) for row in words} == {Window(top, left, h, w)}


def test_windows_are_distributed_as_torchvisions() -> None:
    """Mean area, log ratio and position of 4,000 draws each agree within 4.5 deviations of their difference."""
    n, height, width = 4000, 375, 500
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    words = crop_words(1, 0, torch.arange(n)).tolist()
    ours = np.array([random_window(row, height, width, (0.2, 1.0)) for row in words])

    def statistics(windows: np.ndarray) -> np.ndarray:
        top, left, h, w = windows.T.astype(float)
        return np.stack([h * w / (height * width), np.log(w / h), top + h / 2, left + w / 2])

    a, b = statistics(theirs), statistics(ours)
    deviation = np.sqrt((a.var(1) + b.var(1)) / n)
    assert (np.abs(a.mean(1) - b.mean(1)) < 4.5 * deviation).all()
    np.testing.assert_allclose(a.std(1), b.std(1), rtol=0.06)


@pytest.mark.parametrize(
    ("seed", "epoch", "sample_id", "height", "width", "window"),
    [
        (0, 0, 0, 375, 500, (154, 157, 219, 279)),
        (0, 0, 1, 375, 500, (6, 163, 344, 274)),
        (0, 1, 0, 375, 500, (23, 112, 343, 329)),
        (4_000_000_000, 399, 1_281_166, 500, 333, (94, 33, 302, 293)),
        (7, 3, 2**33 + 5, 100, 240, (12, 72, 85, 108)),
        (1, 0, 3, 32, 32, (11, 3, 21, 24)),
    ],
)
def test_known_windows(
    seed: int, epoch: int, sample_id: int, height: int, width: int, window: tuple[int, int, int, int]
) -> None:
    """This window is frozen: these five numbers give the same window forever, in every loader."""
    words = crop_words(seed, epoch, torch.tensor([sample_id]))[0].tolist()
    assert random_window(words, height, width, (0.2, 1.0)) == window


def test_known_flips() -> None:
    flipped = flips(0, 0, torch.arange(16)).nonzero().flatten()
    assert flipped.tolist() == [3, 6, 7, 8, 9, 13, 14, 15]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True), st.integers(0, 50))
def test_a_sample_does_not_depend_on_its_batch(ids: list[int], epoch: int) -> None:
    together = torch.tensor(ids)
    for i, words, flip in zip(ids, crop_words(3, epoch, together), flips(3, epoch, together)):
        alone = torch.tensor([i])
        assert torch.equal(crop_words(3, epoch, alone)[0], words)
        assert flips(3, epoch, alone)[0] == flip


def test_half_of_the_samples_are_mirrored_anew_each_epoch() -> None:
    first, second = (flips(0, epoch, torch.arange(10_000)) for epoch in (0, 1))
    assert abs(first.double().mean() - 0.5) < 0.02
    assert abs((first ^ second).double().mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (256, 256, (224, 224), (16, 16, 224, 224)),
        (256, 341, (224, 224), (16, 58, 224, 224)),
        (500, 375, (224, 224), (86, 23, 328, 328)),
        (1, 1, (8, 8), (0, 0, 1, 1)),
    ],
)
def test_the_window_of_a_share_is_what_resizing_and_cropping_sees(
    height: int, width: int, size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """MAE's evaluation: the short side resized to 256 pixels, the central 224 of it cut out."""
    assert centre_window(height, width, size, share=0.875) == expected
