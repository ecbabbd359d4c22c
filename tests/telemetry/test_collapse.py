"""Tests of the collapse measures on latents whose values are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mimae.telemetry.collapse import collapse


def axes(count: int, width: int) -> Tensor:
    """Return plus and minus each of the first `count` unit vectors (2 count, width): mean 0, equal variances."""
    half = torch.eye(width)[:count]
    return torch.cat([half, -half])


# There are fewer latents than dimensions (M x M Gram matrix), far fewer, and more, with full rank (D x D).
@pytest.mark.parametrize(("count", "width"), [(3, 8), (6, 64), (8, 8)])
def test_effective_rank_counts_equal_directions(count: int, width: int) -> None:
    assert collapse(5 + 0.01 * axes(count, width))["effective_rank"] == pytest.approx(count, rel=1e-3)


def test_effective_rank_of_unequal_directions() -> None:
    latents = axes(2, 4) * torch.tensor([3.0, 1.0, 1.0, 1.0])  # variances 9 : 1
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert collapse(latents)["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-5)


def test_deviation_is_the_mean_over_dimensions() -> None:
    latents = torch.tensor([[1.0, 7.0, 0.0], [5.0, 7.0, 2.0]])  # deviations 2, 0, 1
    assert collapse(latents)["deviation"] == pytest.approx(1.0)
    assert collapse(latents[:, None])["deviation"] == pytest.approx(1.0)


def test_alignment_and_uniformity_by_hand() -> None:
    # Two images of three views. Lengths differ, but only directions matter. Image 0: x, x, y. Image 1: -x, -x, -x.
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    latents = torch.stack([torch.stack([x, 2 * x, 3 * y]), torch.stack([-x, -4 * x, -x])])
    numbers = collapse(latents)
    # Pairs of image 0: 0, 2, 2; of image 1: 0. Distances between the images: 6 pairs of |2x|^2 = 4, 3 of 2.
    assert numbers["alignment"] == pytest.approx(4 / 6)
    between = (6 * math.exp(-8) + 3 * math.exp(-4)) / 9
    assert numbers["uniformity"] == pytest.approx(math.log(between), rel=1e-5)


def test_one_view_of_each_image_has_no_alignment() -> None:
    numbers = collapse(axes(4, 4))
    # Each of 8 points has one opposite point (squared distance 4) and six orthogonal ones (2).
    assert numbers["alignment"] is None
    assert numbers["uniformity"] == pytest.approx(math.log((math.exp(-8) + 6 * math.exp(-4)) / 7), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_a_point_is_seen_as_collapse(scale: float) -> None:
    point = torch.linspace(-1, 2, 48)
    numbers = collapse((scale * point).expand(16, 4, 48))
    assert numbers["effective_rank"] == 0.0
    assert numbers["deviation"] == pytest.approx(0, abs=1e-6 * scale)
    assert numbers["alignment"] == pytest.approx(0, abs=1e-6)
    assert numbers["uniformity"] == pytest.approx(0, abs=1e-5)
    assert collapse(torch.zeros(4, 2, 3))["effective_rank"] == 0.0


def test_half_precision_is_read_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = (torch.randn(64, 2, 16, generator=generator) + 3).bfloat16()
    assert collapse(latents) == collapse(latents.float())


def test_what_is_not_finite_or_not_defined_is_none() -> None:
    latents = torch.randn(4, 2, 8)
    latents[1, 0, 3] = math.nan
    assert set(collapse(latents).values()) == {None}
    assert collapse(torch.randn(1, 2, 8))["uniformity"] is None
