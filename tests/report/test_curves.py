"""Tests of reduced curves against plain Python, and of their bounds."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from mimae.report.curves import thinned


def test_a_short_curve_stays_as_it_is() -> None:
    x, y = np.arange(5.0), np.array([1, np.nan, 3, 4, 5])
    curve = thinned(x, y, 5)
    assert curve.x is x and curve.y is y and curve.low is None


@pytest.mark.parametrize("length", [11, 1_000, 1_009])  # one more than the points; a multiple of them; a prime
def test_each_point_is_the_mean_of_a_stretch_within_its_band(length: int) -> None:
    random = np.random.default_rng(0)
    x, y = np.arange(length, dtype=float), random.standard_normal(length)
    y[length // 2] = 1e6  # a spike must stay visible
    curve = thinned(x, y, 10)
    edges = [int(place * length / 10) for place in range(11)]
    stretches = [y[a:b].tolist() for a, b in itertools.pairwise(edges)]
    assert curve.y == pytest.approx([statistics.fmean(each) for each in stretches])
    assert curve.x == pytest.approx([(a + b - 1) / 2 for a, b in itertools.pairwise(edges)])
    assert curve.low is not None and curve.high is not None
    assert curve.low.tolist() == [min(each) for each in stretches]
    assert curve.high.tolist() == [max(each) for each in stretches] and max(curve.high) == 1e6


def test_what_is_not_finite_is_left_out_and_a_stretch_of_it_is_a_gap() -> None:
    y = np.array([1.0, np.nan, np.nan, np.nan, 5.0, np.inf])
    curve = thinned(np.arange(6.0), y, 3)
    assert curve.y[[0, 2]].tolist() == [1.0, 5.0] and math.isnan(curve.y[1])
    assert curve.low is not None and math.isnan(curve.low[1])
