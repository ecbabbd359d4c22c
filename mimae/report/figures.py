"""Figures for the comparison of runs (speed, memory, losses, measures), and the rule for a regression.

A figure is one value of a run, with values of segments of the run, which show its noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mimae.report.runs import Floats, Run
from mimae.telemetry.records import number

Better = Literal["max", "min"]

STRETCHES = 20
"""Number of segments that show a run's noise. Neighbouring records are more correlated than means of segments."""

TOLERANCE = 0.05
"""Default tolerance: a figure that is worse by a smaller share is no regression."""

_T95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
)
"""Quantiles of Student's t at 0.95 for 1 to 20 degrees of freedom. For more, the last one is a safe upper bound."""


class Figure(NamedTuple):
    """A figure of one run."""

    value: float
    better: Better
    stretches: list[float]
    """Values of the figure in segments of the run; empty if it is measured once."""


class Change(NamedTuple):
    """The change of a figure between two sets of runs."""

    worse: float
    """Share by which the figure is worse than the reference; negative if it is better."""
    error: float
    """Share that noise explains: the one-sided 95 % bound."""
    by: str
    """Source of the noise estimate."""
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
        # The mean of the last tenth is used, because a single step is noisy.
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
    """Return the change of a figure from the `reference` to `others`, by logarithms if all values are positive.

    A regression is worse by `tolerance` or more, and by more than noise explains: the lower 95 % bound of the change
    (Student's t) is above 0. Noise is the spread between runs if either side has two or more runs. Otherwise it is the
    spread between segments of the two runs, which does not include differences between starts.
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
        by = f"{STRETCHES} segments of each run"
        error = _error(*(moved(each) for each in parts))
    else:
        by, error = "one value of each: noise unknown", 0.0
    # The change of the logarithm is converted to a share of the reference: 0.9 times as fast is worse by 0.1.
    worse = change if not is_log else sign * math.expm1(sign * change)
    return Change(worse, error, by, worse >= tolerance and change > error)


def _error(before: Floats, after: Floats) -> float:
    """Return the 95 % bound of the difference of two means, by their pooled variance.

    At least one side has two values.
    """
    freedom = len(before) + len(after) - 2
    squares = sum(float(np.square(each - each.mean()).sum()) for each in (before, after))
    return _T95[min(freedom, len(_T95)) - 1] * math.sqrt(squares / freedom * (1 / len(before) + 1 / len(after)))


def spread(values: Sequence[Figure]) -> float:
    """Return the standard deviation of a figure over runs; NaN for one run."""
    return statistics.stdev(figure.value for figure in values) if len(values) > 1 else math.nan


def _steady(run: Run) -> Floats:
    """Return a mask that excludes the first record of each start, in which workers start and blocks compile."""
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
    """Return a figure as a baseline stores it."""
    return figure._asdict()


def from_json(found: Mapping[str, Any]) -> Figure:
    """Return a figure of a baseline. Raises ValueError if it is malformed."""
    value = number(found.get("value"))
    stretches = [number(each) for each in found.get("stretches", ())]
    if found.get("better") not in ("max", "min") or not all(map(math.isfinite, [value, *stretches])):
        raise ValueError("it is not a figure")
    return Figure(value, found["better"], stretches)
