"""Long curves in few points: the mean of a stretch as a line, its least and its most as a band.

A curve of 100,000 points drawn as it is hides its mean in its noise, and leaving points out hides its spikes. Means
with a band show both, and their number is bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mimae.report.runs import Floats

POINTS = 300
"""The most points of a drawn curve."""


class Curve(NamedTuple):
    """Points of a line; NaN is a gap."""

    x: Floats
    y: Floats
    low: Floats | None = None
    """Least value of the stretch that a point stands for, as `high` is the most; None where a point is one value."""
    high: Floats | None = None


def thinned(x: Floats, y: Floats, points: int = POINTS) -> Curve:
    """Return a curve of at most `points` points: stretches of equal length, each at the mean of its x and y.

    A stretch without any finite value is a gap.
    """
    if len(x) <= points:
        return Curve(x, y)
    starts = np.linspace(0, len(x), points, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    is_finite = np.isfinite(y)
    finite = np.add.reduceat(is_finite.astype(float), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(is_finite, y, 0.0), starts) / finite  # 0/0 is the NaN of a gap
    low = np.minimum.reduceat(np.where(is_finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(is_finite, y, -np.inf), starts)
    gap = finite == 0
    return Curve(np.add.reduceat(x, starts) / counts, mean, np.where(gap, np.nan, low), np.where(gap, np.nan, high))
