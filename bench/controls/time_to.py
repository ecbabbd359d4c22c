"""The cost at which a control reaches MAE's final accuracies, from probes of its checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mimae.bench.controls.trials import CHOICES, CONTROLS, Result
from mimae.evaluate.knn import NEIGHBOURS
from mimae.evaluate.probe import MEASURES


class Reached(NamedTuple):
    """The cost of a run until it reached a level: optimizer steps, FLOPs, CPU seconds of the training command.

    The CPU seconds of an interrupted run are not known.
    """

    steps: float
    flops: float
    cpu_seconds: float | None


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


def reached(result: Result, measure: str, level: float) -> Reached | None:
    """Return the cost until a run reached an accuracy, interpolated between two probes; None if it never did."""
    probes, cpu_seconds = result["probes"], result["cpu_seconds"]
    crossed = next((i for i, probe in enumerate(probes) if probe[measure] >= level), None)
    if crossed is None:
        return None
    now = before = probes[crossed]
    share = 0.0  # The first probe has no earlier one for an interpolation.
    if crossed:
        before = probes[crossed - 1]
        share = (level - before[measure]) / (now[measure] - before[measure])
    steps, flops, seconds = (before[key] + share * (now[key] - before[key]) for key in ("step", "flops", "seconds"))
    return Reached(steps, flops, None if cpu_seconds is None else cpu_seconds * seconds / probes[-1]["seconds"])


def render_times(results: Sequence[Result]) -> Iterator[str]:
    """Yield the tables of one data set, one for each measure. MAE's level is its mean at the end over the seeds."""
    timed = [result for result in results if result.get("probes")]
    mae = [result for result in timed if result["kind"] == "mae"]
    if not mae:
        return
    probes, few = mae[0]["probes"], mae[0]["probe"]["few_labels"]
    yield (
        f"Time to MAE's final accuracies. The probe evaluated {len(probes)} checkpoints of each run, the first after "
        f"{probes[0]['step']:,} steps, and the time is interpolated linearly between two of them. A run that is as "
        "good at the first one has its cost, which is an upper bound. FLOPs are those of the steps, as a share of all "
        "of MAE's. CPU seconds are those of the training command, in proportion to the seconds of the epochs. Costs "
        "are means over the seeds that reached the accuracy.\n"
    )
    for measure, name in zip(MEASURES, ("linear probe", f"{few} labels", f"{NEIGHBOURS} neighbours"), strict=True):
        yield from _render_measure(timed, mae, measure, name)


def _render_measure(timed: list[Result], mae: list[Result], measure: str, name: str) -> Iterator[str]:
    """Yield the table of one measure."""
    level = statistics.fmean(result["probes"][-1][measure] for result in mae)
    whole = statistics.fmean(result["probes"][-1]["flops"] for result in mae)
    yield f"| {name}: MAE's {level:.3f} | seeds | at the end | reached by | steps | FLOPs, of MAE's | CPU s |"
    yield "|---|---|---|---|---|---|---|"
    for kind, row in {**CONTROLS, **CHOICES}.items():
        rows = [result for result in timed if result["kind"] == kind]
        if not rows:
            continue
        last = statistics.fmean(result["probes"][-1][measure] for result in rows)
        found = [when for result in rows if (when := reached(result, measure, level)) is not None]
        cells = ["not reached", "", ""]
        if found:
            steps, flops = (statistics.fmean(column) for column in list(zip(*found, strict=True))[:2])
            seconds = [each.cpu_seconds for each in found if each.cpu_seconds is not None]
            cells = [f"{steps:,.0f}", f"{flops / whole:.2f}", f"{statistics.fmean(seconds):.0f}" if seconds else ""]
        yield f"| {row.meaning} | {len(rows)} | {last:.3f} | {len(found)} of {len(rows)} | {' | '.join(cells)} |"
    yield ""
