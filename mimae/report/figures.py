"""Figures of a run that runs are compared by: speed, memory, losses, measures; and the rule that calls one worse.

A figure is one value of a run, with the values of some stretches of it as a sign of its noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mimae.report.runs import Floats, Run, number

Better = Literal["max", "min"]

STRETCHES = 20
"""Stretches of a run that show its noise. Records beside each other are alike; means of stretches are less so."""

TOLERANCE = 0.05
"""A change for the worse below this share is none."""

_T95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
)
"""Quantiles of Student's t at 0.95 for 1 to 20 degrees of freedom; for more of them the last is on the safe side."""


class Figure(NamedTuple):
    """A figure of one run."""

    value: float
    better: Better
    stretches: list[float]
    """Values of the figure in parts of the run; empty for what is measured once."""


class Change(NamedTuple):
    """A figure of some runs against that of others."""

    worse: float
    """Share by which it is worse than the reference; below 0 it is better."""
    error: float
    """Part of the difference that noise explains: the 95 % bound of one side."""
    by: str
    """Source from which the noise was read."""
    is_regression: bool


def figures(run: Run) -> dict[str, Figure]:
    """Return the figures of a run by name."""
    found = {}
    rates = run.steps["images_per_s"][_steady(run)]
    if np.isfinite(rates).any():
        found["images_per_s"] = Figure(float(np.nanmedian(rates)), "max", _stretches(rates, np.nanmedian))
    if run.steps.has("mem_peak_bytes"):
        found["mem_peak_bytes"] = Figure(float(np.nanmax(run.steps["mem_peak_bytes"])), "min", [])
    for key in run.losses:
        # The last tenth: a single step is noise.
        last = run.steps[key][-max(1, len(run.steps) // 10) :]
        if key == "loss" and np.isfinite(last).any():
            found[f"{key}, last tenth"] = Figure(float(np.nanmean(last)), "min", _stretches(last, np.nanmean))
    for key, way in run.directions.items():
        if run.epochs.has(key):
            found[key] = Figure(run.epochs.last(key), "max" if way == "max" else "min", [])
    features = run.probe.get("features")
    scores = features.get("this run") if isinstance(features, dict) else None
    for key in ("linear", "few_labels", "knn"):
        if isinstance(scores, dict) and math.isfinite(score := number(scores.get(key))):
            found[f"probe: {key}"] = Figure(score, "max", [])
    return found


def compare(reference: Sequence[Figure], others: Sequence[Figure], tolerance: float = TOLERANCE) -> Change:
    """Return by how much `others` are worse than the `reference`, in logarithms where all values are positive.

    A regression is worse by `tolerance` or more, and by more than noise explains: the lower 95 % bound of the change
    (Student's t) lies above 0. Noise is the spread between runs where either side has two or more, else the spread
    between stretches of the two runs, which holds no difference between one start and the next.
    """
    values = [np.array([figure.value for figure in side]) for side in (reference, others)]
    parts = [np.array(side[0].stretches) for side in (reference, others)]
    sign = 1 if reference[0].better == "min" else -1
    middle = abs(float(values[0].mean()))
    is_log = all((each > 0).all() for each in (*values, *parts) if len(each))

    def moved(each: Floats) -> Floats:
        return np.log(each) if is_log else each / (middle or 1.0)

    before, after = (moved(each) for each in values)
    change = sign * float(after.mean() - before.mean())
    if max(len(before), len(after)) > 1:
        by = f"{len(before)} and {len(after)} runs"
        error = _error(before, after)
    elif all(len(each) > 1 for each in parts):
        by = f"{STRETCHES} stretches of each run"
        error = _error(*(moved(each) for each in parts))
    else:
        by, error = "one value of each: no noise known", 0.0
    # The change of the logarithm, as a share of the reference: 0.9 times as fast is worse by 0.1.
    worse = change if not is_log else sign * math.expm1(sign * change)
    return Change(worse, error, by, worse >= tolerance and change > error)


def _error(before: Floats, after: Floats) -> float:
    """Return the 95 % bound of the difference of two means, by their pooled spread. One of them has two values."""
    freedom = len(before) + len(after) - 2
    squares = sum(float(np.square(each - each.mean()).sum()) for each in (before, after))
    return _T95[min(freedom, len(_T95)) - 1] * math.sqrt(squares / freedom * (1 / len(before) + 1 / len(after)))


def spread(values: Sequence[Figure]) -> float:
    """Return the deviation of a figure over runs; NaN of one run."""
    return statistics.stdev(figure.value for figure in values) if len(values) > 1 else math.nan


def _steady(run: Run) -> Floats:
    """Return a mask of the records without the first one of each start, in which workers start and blocks compile."""
    starts = [number(event.get("step")) for event in run.events if event["kind"] in ("start", "resume")]
    firsts = np.searchsorted(run.steps["step"], [0.0, *(step for step in starts if step >= 0)], side="right")
    mask = np.ones(len(run.steps), dtype=bool)
    if len(mask) > 2 * len(firsts):
        mask[np.minimum(firsts, len(mask) - 1)] = False
    return mask


def _stretches(values: Floats, mean: Any) -> list[float]:
    found = values[np.isfinite(values)]
    if len(found) < 2 * STRETCHES:
        return found.tolist()
    return [float(mean(part)) for part in np.array_split(found, STRETCHES)]


def to_json(figure: Figure) -> dict[str, Any]:
    """Return a figure as a baseline keeps it."""
    return figure._asdict()


def from_json(found: Mapping[str, Any]) -> Figure:
    """Return a figure of a baseline. Raises ValueError for anything else."""
    value = number(found.get("value"))
    stretches = [number(each) for each in found.get("stretches", ())]
    if found.get("better") not in ("max", "min") or not all(map(math.isfinite, [value, *stretches])):
        raise ValueError("it is no figure")
    return Figure(value, found["better"], stretches)
