"""Tests of reconstruction pictures: every pixel is at its place, for any shape of image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimae import kernels
from mimae.model.masking import targets
from mimae.telemetry.pictures import HIDDEN, reconstruction_grid, reconstructions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Images have 3 x 5 patches of 4 pixels, so that swapped rows and columns fail; 15 patches have a rest after 2 x 4.
PATCH, ROWS, COLUMNS = 4, 3, 5


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, ROWS * PATCH, COLUMNS * PATCH, 3), generator=generator).byte()
    images[0, :PATCH, :PATCH] = 77  # a flat patch: its variance is zero
    visible, hidden = kernels.orthogonal_masks(0, 0, torch.arange(2), ROWS * COLUMNS, 2, 4)
    return images, visible, hidden


def options(normalize: bool) -> dict[str, Any]:
    return {"patch": PATCH, "mean": MEAN, "std": STD, "normalize": normalize}


def block(picture: Tensor, number: int) -> np.ndarray:
    """Return the pixels of a patch of a picture (H, W, 3), by slicing."""
    row, column = divmod(number, COLUMNS)
    return picture[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].numpy()


def target(pixels: np.ndarray, normalize: bool) -> Tensor:
    """Return the decoder's target for a patch, computed directly in float64."""
    values = ((pixels / 255 - MEAN) / STD).reshape(-1)
    if normalize:
        values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
    return torch.from_numpy(values).float()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_perfect_prediction_gives_the_image_back(batch: tuple[Tensor, Tensor, Tensor], normalize: bool) -> None:
    images, visible, hidden = batch
    predictions = torch.empty(*hidden.shape, 3 * PATCH**2)
    for place in np.ndindex(*hidden.shape):
        predictions[place] = target(block(images[place[0]], int(hidden[place])), normalize)
    masked, rebuilt = reconstructions(images, visible, hidden, predictions, **options(normalize))
    assert torch.equal(rebuilt, images[:, None].expand_as(rebuilt))
    for b in range(2):
        for n in range(2):
            for number in range(ROWS * COLUMNS):
                is_visible = number in visible[b, n].tolist()
                expected = block(images[b], number) if is_visible else np.full((PATCH, PATCH, 3), HIDDEN)
                assert np.array_equal(block(masked[b, n], number), expected)


def test_predictions_are_denormalised_and_clipped(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    images, visible, hidden = batch
    shape = (*hidden.shape, 3 * PATCH**2)
    _, flat = reconstructions(images, visible, hidden, torch.zeros(shape), **options(False))
    place = int(hidden[0, 1, 2])
    mean_colour = np.round(255 * np.array(MEAN)).astype(np.uint8)
    assert (block(flat[0, 1], place) == mean_colour).all()
    _, bright = reconstructions(images, visible, hidden, torch.full(shape, 1e4), **options(False))
    assert (block(bright[0, 1], int(hidden[0, 1, 2])) == 255).all()
    assert np.array_equal(block(bright[0, 1], int(visible[0, 1, 0])), block(images[0], int(visible[0, 1, 0])))


def test_a_normalised_prediction_is_shown_by_its_pattern_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Change brightness and contrast of the prediction: the picture stays the same."""
    images, visible, hidden = batch
    predictions = torch.randn((*hidden.shape, 3 * PATCH**2), generator=torch.Generator().manual_seed(2))
    drawn = [
        reconstructions(images, visible, hidden, each, **options(True))[1].int()
        for each in (predictions, 3 * predictions + 1)
    ]
    assert (drawn[0] - drawn[1]).abs().max() <= 1  # rounding to uint8


def test_a_flat_grey_prediction_of_a_grey_edge_is_grey() -> None:
    """Draw a flat grey prediction for a grey edge: the picture must be grey.

    Normalized by its own small variance, a flat patch has very different channels. Scaled by the contrast of an edge it
    would be blue, by 100 of 255 and more.
    """
    images = torch.full((1, ROWS * PATCH, COLUMNS * PATCH, 3), 60, dtype=torch.uint8)
    images[:, :, ::2] = 200
    visible, hidden = kernels.orthogonal_masks(0, 0, torch.arange(1), ROWS * COLUMNS, 2, 4)
    flat = target(np.full((PATCH, PATCH, 3), 130), normalize=True)
    predictions = flat.expand(*hidden.shape, -1)
    _, rebuilt = reconstructions(images, visible, hidden, predictions, **options(True))
    shown = block(rebuilt[0, 0], int(hidden[0, 0, 0])).astype(int)
    assert np.ptp(shown) <= 3 and abs(shown.mean() - 130) < 3


def test_what_is_neither_shown_nor_predicted_stays_grey(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Draw a view that predicts the next one: of 15 patches, 4 are visible, 4 predicted, and 7 neither."""
    images, visible, hidden = batch
    predicted = targets("next_view", visible, hidden)
    predictions = torch.full((*predicted.shape, 3 * PATCH**2), 1e4, dtype=torch.bfloat16)  # white
    _, rebuilt = reconstructions(images, visible, predicted, predictions, **options(False))
    for view, other in ((0, 1), (1, 0)):
        for number in range(ROWS * COLUMNS):
            own, theirs = (number in visible[1, v].tolist() for v in (view, other))
            expected = block(images[1], number) if own else np.full(3, 255) if theirs else np.array(HIDDEN)
            assert (block(rebuilt[1, view], number) == expected).all()


def test_the_grid_holds_every_panel_enlarged(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    images, visible, hidden = batch
    predictions = torch.randn((*hidden.shape, 3 * PATCH**2), generator=torch.Generator().manual_seed(1))
    masked, rebuilt = reconstructions(images, visible, hidden, predictions, **options(True))
    png = reconstruction_grid(images, masked, rebuilt, True)
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    found: list[tuple[int, int]] = []
    for panel in (images[1], masked[1, 0], rebuilt[1, 0], masked[1, 1], rebuilt[1, 1]):
        tile = panel.numpy().repeat(11, 0).repeat(11, 1)  # 12 pixels high: a factor of 11 gives at least 128
        height, width = tile.shape[:2]
        corners = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (height, width))
        candidates = (corners[..., 0, 0] == tile[0, 0, 0]) & (corners[..., -1, -1] == tile[-1, -1, 0])
        places = [
            (int(x), int(y))
            for y, x in np.argwhere(candidates)
            if np.array_equal(sheet[y : y + height, x : x + width], tile)
        ]
        assert len(places) == 1
        found += places
    assert [x for x, _ in found] == sorted(x for x, _ in found)  # left to right, in this order
    assert len({y for _, y in found}) == 1  # in one row
