"""Tests of the oracles against closed forms and a figure computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracles.club_oracle import club, l_fit, standardised
from tests.oracles.infonce_oracle import l_max
from tests.oracles.mae_oracle import pixel_targets, sincos_positions


def test_infonce_of_equal_latents_is_log_batch() -> None:
    assert l_max(torch.ones(5, 3, 4, dtype=torch.float64), 0.07).item() == pytest.approx(math.log(5), abs=1e-12)


def test_infonce_by_hand() -> None:
    # There are two images, two views, and unit vectors along the axes: similarities are 1 and 0, the temperature 1/2.
    latents = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 2, 2)
    assert l_max(latents, 0.5).item() == pytest.approx(math.log(math.e**2 + 1) - 2, abs=1e-12)


def test_club_by_hand() -> None:
    # With scalars y = (0, 2), mu = y and variance 1, own terms cancel the constant, and crossed pairs cost 2 each.
    y = torch.tensor([[[0.0]], [[2.0]]], dtype=torch.float64)
    mu, log_variance = y[:, 0], torch.zeros(2, 1, dtype=torch.float64)
    assert club(y, mu, log_variance).item() == pytest.approx(1.0, abs=1e-12)
    assert l_fit(y, mu, log_variance + math.log(4.0)).item() == pytest.approx(math.log(4.0) / 2, abs=1e-12)


def test_standardising_is_data() -> None:
    latents = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64, requires_grad=True)
    y = standardised(latents, 0.0)
    assert y.flatten().tolist() == [-1.0, 1.0]
    # If moments were differentiated, this gradient would be 0.
    assert torch.autograd.grad(y[1, 0, 0], latents)[0].flatten().tolist() == [0.0, 1.0]


def test_positions_tell_columns_then_rows() -> None:
    table = sincos_positions((2, 3), 8)
    assert table[0].abs().sum() == 0
    row1_column2 = table[1 + 1 * 3 + 2]
    expected = [f(x * w) for x in (2, 1) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert torch.allclose(row1_column2, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def test_targets_take_a_patch_row_by_row_with_channels_last() -> None:
    pixels = torch.arange(3 * 2 * 4, dtype=torch.float64).view(1, 3, 2, 4)
    second = pixel_targets(pixels, 2, normalize=False)[0, 1].tolist()
    assert second == [2, 10, 18, 3, 11, 19, 6, 14, 22, 7, 15, 23]
    unit = pixel_targets(pixels, 2, normalize=True)[0, 1]
    assert unit.var().item() == pytest.approx(1.0, abs=1e-6)
