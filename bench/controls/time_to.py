"""The time in which a control reaches MAE's final accuracy of nearest neighbours, as evaluated during training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mimae.bench.controls.trials import CHOICES, CONTROLS, Result


class Reached(NamedTuple):
    """The cost of a run until it reached a level: optimizer steps, FLOPs, CPU seconds of the whole command.

    The CPU seconds of an interrupted run are not known.
    """

    steps: float
    flops: float
    cpu_seconds: float | None


def checks_of(epochs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the evaluations in a run's epochs.jsonl, each with the FLOPs of all steps before it."""
    found, flops = [], 0.0
    for epoch in epochs:
        flops += 1e12 * (epoch["tflops"] or 0.0) * epoch["seconds"]
        if epoch.get("knn") is not None:
            found.append({"step": epoch["step"], "flops": flops, "knn": epoch["knn"], "val_rec": epoch["val_rec"]})
    return found


def reached(result: Result, level: float) -> Reached | None:
    """Return the cost until a run reached an accuracy, interpolated between two evaluations; None if it never did.

    The CPU seconds are those of the whole command times the share of its steps: an upper bound if images grow.
    """
    checks = result["checks"]
    before = {"step": 0, "flops": 0.0, "knn": 0.0}
    for check in checks:
        if check["knn"] >= level:
            # The first evaluation has no earlier one for an interpolation.
            share = (level - before["knn"]) / (check["knn"] - before["knn"]) if before["step"] else 1.0
            steps, flops = (before[key] + share * (check[key] - before[key]) for key in ("step", "flops"))
            seconds = result["cpu_seconds"]
            return Reached(steps, flops, None if seconds is None else seconds * steps / checks[-1]["step"])
        before = check
    return None


def render_times(results: Sequence[Result]) -> Iterator[str]:
    """Yield the table of one data set. MAE's level is the mean of its last evaluations over the seeds."""
    timed = [result for result in results if result.get("checks")]
    mae = [result for result in timed if result["kind"] == "mae"]
    if not mae:
        return
    level = statistics.fmean(result["checks"][-1]["knn"] for result in mae)
    whole = statistics.fmean(result["checks"][-1]["flops"] for result in mae)
    yield (
        f"Time to MAE's final accuracy, {level:.3f} by the vote of the neighbours as evaluated during training (with "
        "fewer images than in the probe, and linear interpolation between evaluations). FLOPs are those of the steps, "
        "as a share of all of MAE's. CPU seconds are those of the whole command, in proportion to the steps (an upper "
        "bound if images grow):\n"
    )
    yield "| control | seeds | last evaluation | reached by | steps | FLOPs, of MAE's | CPU s |"
    yield "|---|---|---|---|---|---|---|"
    for kind, row in {**CONTROLS, **CHOICES}.items():
        rows = [result for result in timed if result["kind"] == kind]
        if not rows:
            continue
        last = statistics.fmean(result["checks"][-1]["knn"] for result in rows)
        found = [when for result in rows if (when := reached(result, level)) is not None]
        cells = ["not reached", "", ""]
        if found:
            steps, flops = (statistics.fmean(column) for column in list(zip(*found, strict=True))[:2])
            seconds = [each.cpu_seconds for each in found if each.cpu_seconds is not None]
            cells = [f"{steps:,.0f}", f"{flops / whole:.2f}", f"{statistics.fmean(seconds):.0f}" if seconds else ""]
        yield f"| {row.meaning} | {len(rows)} | {last:.3f} | {len(found)} of {len(rows)} | {' | '.join(cells)} |"
    yield ""
