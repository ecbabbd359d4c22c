"""The cost at which a control reaches MAE's final accuracies, from probes of its checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mimae.bench.controls.trials import CHOICES, CONTROLS, Result
from mimae.evaluate.knn import NEIGHBOURS
from mimae.evaluate.probe import MEASURES


class Cost(NamedTuple):
    """The cost of a part of a run: optimizer steps, FLOPs, and CPU seconds of the training command.

    The CPU seconds are None if no run of the control was timed as a whole.
    """

    steps: float
    flops: float
    cpu_seconds: float | None


class Point(NamedTuple):
    """A probe of a control: means over its seeds."""

    cost: Cost
    accuracies: dict[str, float]


def checks_of(epochs: Sequence[dict[str, Any]], every: int) -> list[dict[str, float]]:
    """Return the times at which a run is probed: after every `every` epochs, and at its end.

    Each is a step, with the FLOPs and seconds of all steps before it. `epochs` is the content of epochs.jsonl.
    """
    found, flops, seconds = [], 0.0, 0.0
    for number, epoch in enumerate(epochs, 1):
        flops += 1e12 * (epoch["tflops"] or 0.0) * epoch["seconds"]
        seconds += epoch["seconds"]
        if number % every == 0 or number == len(epochs):
            found.append({"step": epoch["step"], "flops": flops, "seconds": seconds})
    return found


def curve(results: Sequence[Result]) -> list[Point]:
    """Return the probes of the runs of one control."""
    points = []
    for probes in zip(*(result["probes"] for result in results), strict=True):
        shares = [
            probe["seconds"] / result["probes"][-1]["seconds"] for probe, result in zip(probes, results, strict=True)
        ]
        timed = [
            share * result["cpu_seconds"]
            for share, result in zip(shares, results, strict=True)
            if result["cpu_seconds"] is not None  # An interrupted run was not timed as a whole.
        ]
        steps, flops = (statistics.fmean(probe[key] for probe in probes) for key in ("step", "flops"))
        accuracies = {measure: statistics.fmean(probe[measure] for probe in probes) for measure in MEASURES}
        points.append(Point(Cost(steps, flops, statistics.fmean(timed) if timed else None), accuracies))
    return points


def reached(points: Sequence[Point], measure: str, level: float) -> Cost | None:
    """Return the cost until a control reached an accuracy and kept it to its end; None if it did not.

    The cost is interpolated between the last probe below the level and the next one. It is that of the first probe, an
    upper bound, if no probe is below the level.
    """
    below = [i for i, point in enumerate(points) if point.accuracies[measure] < level]
    if not below:
        return points[0].cost
    if below[-1] == len(points) - 1:
        return None
    before, after = points[below[-1]], points[below[-1] + 1]
    share = (level - before.accuracies[measure]) / (after.accuracies[measure] - before.accuracies[measure])
    (steps, flops, seconds), (steps_after, flops_after, seconds_after) = before.cost, after.cost
    if seconds is not None and seconds_after is not None:
        seconds += share * (seconds_after - seconds)
    return Cost(steps + share * (steps_after - steps), flops + share * (flops_after - flops), seconds)


def render_times(results: Sequence[Result]) -> Iterator[str]:
    """Yield the tables of one data set, one for each measure."""
    found = {
        kind: rows
        for kind in (*CONTROLS, *CHOICES)
        if (rows := [result for result in results if result["kind"] == kind and result.get("probes")])
    }
    if "mae" not in found:
        return
    curves = {kind: curve(rows) for kind, rows in found.items()}
    seeds = {kind: len(rows) for kind, rows in found.items()}
    mae = curves["mae"]
    yield (
        f"Time to MAE's final accuracies, from probes of {len(mae)} checkpoints of each run, the first after "
        f"{mae[0].cost.steps:,.0f} steps. All figures are means over the seeds. An accuracy is reached where the curve "
        "of the means rises to it for the last time, by linear interpolation between two probes; ≤ stands for the "
        "first probe, if none is below the accuracy. FLOPs are those of the steps, as a share of all of MAE's. CPU "
        "seconds are those of the training command, in proportion to the seconds of the epochs.\n"
    )
    names = ("linear probe", f"{found['mae'][0]['probe']['few_labels']} labels", f"{NEIGHBOURS} neighbours")
    for measure, name in zip(MEASURES, names, strict=True):
        level = mae[-1].accuracies[measure]
        yield f"| {name}: MAE's {level:.3f} | seeds | at the end | steps | FLOPs, of MAE's | CPU s |"
        yield "|---|---|---|---|---|---|"
        for kind, points in curves.items():
            cells = _cells(points, measure, level, mae[-1].cost.flops)
            end = points[-1].accuracies[measure]
            yield f"| {(CONTROLS | CHOICES)[kind].meaning} | {seeds[kind]} | {end:.3f} | {' | '.join(cells)} |"
        yield ""


def _cells(points: Sequence[Point], measure: str, level: float, whole: float) -> list[str]:
    """Return steps, FLOPs as a share of `whole`, and CPU seconds, as text."""
    cost = reached(points, measure, level)
    if cost is None:
        return ["not reached", "", ""]
    bound = "≤ " if cost == points[0].cost else ""
    seconds = "" if cost.cpu_seconds is None else f"{bound}{cost.cpu_seconds:.0f}"
    return [f"{bound}{cost.steps:,.0f}", f"{bound}{cost.flops / whole:.2f}", seconds]
