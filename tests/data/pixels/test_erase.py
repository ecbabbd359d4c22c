"""Random erasing: timm's distribution of rectangles, and normal noise in them."""

from __future__ import annotations

import random

import pytest
import torch
from timm.data.random_erasing import RandomErasing

from mimae.data.pixels.erase import erase, rectangles


def test_a_quarter_is_erased_and_areas_are_as_timm_draws_them() -> None:
    """4,000 images of 32 x 48 of ours, 2,000 of timm's: quartiles of the area, and shares by four deviations."""
    found = rectangles(1, 2, torch.arange(4000), 0.25, (32, 48))
    areas = (found[:, 1] - found[:, 0]) * (found[:, 3] - found[:, 2])
    assert (areas > 0).double().mean() == pytest.approx(0.25, abs=0.028)
    assert found.min() >= 0 and (found[:, 1] <= 32).all() and (found[:, 3] <= 48).all()
    assert areas.max() <= 32 * 48 / 3 + 48
    random.seed(0)
    theirs = RandomErasing(probability=1.0, mode="const", device="cpu")
    counts = [int((theirs(torch.ones(3, 32, 48))[0] == 0).sum()) for _ in range(2000)]
    quantiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    ours = torch.quantile(areas[areas > 0].double(), quantiles)
    torch.testing.assert_close(ours, torch.quantile(torch.tensor(counts).double(), quantiles), atol=25, rtol=0)


def test_the_rectangle_is_noise_and_the_rest_stays() -> None:
    images, ids = torch.full((64, 32, 32, 3), 7.0), torch.arange(100, 164)
    erased = erase(images, 0, 0, ids, 1.0)
    boxes = rectangles(0, 0, ids, 1.0, (32, 32))
    for image, (top, bottom, left, right) in zip(erased, boxes.tolist(), strict=True):
        assert (image[top:bottom, left:right] != 7).all()
        assert (image == 7).sum() == 3 * (32 * 32 - (bottom - top) * (right - left))
    noise = erased[erased != 7]
    assert noise.mean().item() == pytest.approx(0, abs=0.03) and noise.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(erase(images[5:9], 0, 0, ids[5:9], 1.0), erased[5:9]), "a sample's own, whatever the batch"
    assert torch.equal(erase(images, 0, 0, ids, 0.0), images)
