"""Reduction of long curves to few points: the mean of each segment as a line, its minimum and maximum as a band.

If all 100,000 points of a curve are drawn, noise hides the mean. If points are left out, spikes are lost. Means with a
band show both, and the number of points is bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mimae.report.runs import Floats

POINTS = 300
"""Maximal number of points of a drawn curve."""


class Curve(NamedTuple):
    """The points of a line; NaN is a gap."""

    x: Floats
    y: Floats
    low: Floats | None = None
    """Minimum of the segment that a point stands for; None if a point is a single value."""
    high: Floats | None = None
    """Maximum of that segment."""


def thinned(x: Floats, y: Floats, points: int = POINTS) -> Curve:
    """Return a curve of at most `points` points: the means of x and y over segments of equal length.

    A segment without a finite value is a gap.
    """
    if len(x) <= points:
        return Curve(x, y)
    starts = np.linspace(0, len(x), points, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    is_finite = np.isfinite(y)
    finite = np.add.reduceat(is_finite.astype(float), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(is_finite, y, 0.0), starts) / finite  # 0/0 gives the NaN of a gap.
    low = np.minimum.reduceat(np.where(is_finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(is_finite, y, -np.inf), starts)
    gap = finite == 0
    return Curve(np.add.reduceat(x, starts) / counts, mean, np.where(gap, np.nan, low), np.where(gap, np.nan, high))
