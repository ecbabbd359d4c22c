"""The most important findings about a run, from its records: one sentence each, the most serious first."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np

from mimae.config.recipe import Recipe
from mimae.outside.text import printable
from mimae.report.runs import Floats, Run
from mimae.telemetry import cores
from mimae.telemetry.records import PHASES, number

Weight = Literal["bad", "warn", "good"]

SLOW = 0.05
"""Smallest share of the wall time that is reported."""

_WARNINGS = 3
"""Maximal number of the run's own warnings that are repeated."""


class Finding(NamedTuple):
    weight: Weight
    text: str


def findings(run: Run) -> list[Finding]:
    """Return the findings about a run, or one sentence if nothing is remarkable."""
    found = [*_faults(run), *_waits(run), *_learning(run)]
    order = ("bad", "warn", "good")
    return sorted(found, key=lambda finding: order.index(finding.weight)) or [
        Finding("good", "Nothing stands out: no faults, no skipped steps, little waiting.")
    ]


def _faults(run: Run) -> list[Finding]:
    kinds = Counter(event["kind"] for event in run.events)
    found = []
    last = run.events[-1] if run.events else {}
    if last.get("kind") == "error":
        details = last["details"]
        said = printable(f"{details.get('error', '?')}: {details.get('message', '')}")
        found.append(Finding("bad", f"The run ended with an error: {said[:300]}"))
    if kinds["skipped"]:
        found.append(
            Finding("bad", f"{_times(kinds['skipped'], 'step was', 'steps were')} skipped: a gradient was not finite.")
        )
    steps = run.steps
    if lost := [key for key in run.losses if steps.has(key) and not math.isfinite(steps[key][-1])]:
        found.append(Finding("bad", f"Not finite at the last logged step: {', '.join(lost)}."))
    if kinds["save failed"]:
        found.append(Finding("bad", f"{_times(kinds['save failed'], 'save', 'saves')} of a checkpoint failed."))
    if kinds["fault"]:
        found.append(Finding("warn", f"{_times(kinds['fault'], 'fault', 'faults')}: see the table of events."))
    warnings = [event["details"] for event in run.events if event["kind"] == "warning"]
    # The diagnosis of waiting is reported together with its share of the time.
    others = dict.fromkeys(printable(str(each.get("what"))) for each in warnings if "waited" not in each)
    found += [Finding("warn", f"{text[:1].upper()}{text[1:300]}.") for text in list(others)[-_WARNINGS:]]
    if kinds["resume"]:
        found.append(Finding("good", f"The run was resumed {_times(kinds['resume'], 'time', 'times')}."))
    if run.bad_samples:
        found.append(
            Finding("warn", f"{_times(len(run.bad_samples), 'sample', 'samples')} could not be read and were replaced.")
        )
    return found


def _waits(run: Run) -> list[Finding]:
    """Return findings about wall time that is not spent on computing."""
    epochs = run.epochs
    seconds = np.nansum(epochs["seconds"])
    if not seconds > 0:
        return []

    def share(key: str) -> float:
        return float(np.nansum(epochs[key]) / seconds)

    found = []
    waiting = share("seconds_data") if epochs.has("seconds_data") else 0.0
    if waiting > SLOW:
        found.append(Finding("warn", f"{waiting:.0%} of the time went into waiting for data. {_cause(run)}"))
    saving = share("seconds_checkpoint")
    if saving > SLOW:
        found.append(
            Finding(
                "warn",
                f"{saving:.0%} of the time went into saving: save less often (checkpoint.every_steps, every_epochs).",
            )
        )
    rest = 1 - sum(share(f"seconds_{phase}") for phase in PHASES)
    if epochs.has("seconds_forward") and rest > SLOW:
        found.append(
            Finding(
                "warn",
                f"{rest:.0%} of the time was spent outside the phases of a step: logging, pictures, and the evaluation "
                "at the end of an epoch (telemetry.probe_every_epochs, images_every_epochs).",
            )
        )
    held_back = cores.cause({name: _mean(epochs[name]) for name in cores.COLUMNS if epochs.has(name)})
    if held_back is not None:
        found.append(Finding("warn", f"The cores held the run back: {held_back}."))
    exposed = epochs.last("exposed_communication")
    if exposed > SLOW:
        found.append(
            Finding("warn", f"During {exposed:.0%} of a step ranks communicate and nothing computes: docs/scaling.md.")
        )
    alike = _of_the_last_size(run)
    rates = epochs["images_per_s"][alike & np.isfinite(epochs["images_per_s"])]
    if len(rates) >= 4 and rates[-1] < 0.85 * np.median(rates):
        found.append(
            Finding(
                "warn",
                f"The last epoch ran at {rates[-1]:,.0f} images/s, {1 - rates[-1] / np.median(rates):.0%} below the "
                f"median epoch: possible causes are another program on the machine, or a device that is too hot.",
            )
        )
    memory = epochs["mem_peak_bytes"][alike & np.isfinite(epochs["mem_peak_bytes"])]
    if len(memory) >= 6 and memory[-1] > 1.2 * memory[len(memory) // 2]:
        found.append(Finding("warn", "Peak memory rose by more than a fifth in the second half of the epochs: a leak?"))
    return found


def _of_the_last_size(run: Run) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which epochs had images of the run's last size in all of their steps (see schedule.resolution)."""
    size, ends = run.steps["image_size"], run.epochs["step"]
    smaller = run.steps["step"][np.isfinite(size) & (size != run.steps.last("image_size"))]
    return np.concatenate([[0.0], ends[:-1]])[: len(ends)] >= max(smaller, default=0.0)


def _learning(run: Run) -> list[Finding]:
    found = []
    gate = run.steps.last("gate")
    if gate == 0 and isinstance(run.recipe, Recipe) and run.recipe.objective.gate_loss is not None:
        found.append(
            Finding("warn", "The gate of the MI terms is still closed: L_rec never fell below objective.gate_loss.")
        )
    rank = run.epochs.last("effective_rank")
    if rank < 2:
        found.append(Finding("bad", f"Latents have collapsed: their effective rank is {rank:.2f}."))
    return found


def _cause(run: Run) -> str:
    """Return the run's diagnosis of its longest waiting for data, or advice if there is none.

    A run has a diagnosis if it lasted long enough.
    """
    diagnoses = [event for event in run.events if event["kind"] == "warning" and "waited" in event["details"]]
    if not diagnoses:
        return "mimae bench data compares loaders."
    longest = max(diagnoses, key=lambda event: float(np.nan_to_num(number(event["details"]["waited"]))))
    step = longest.get("step")
    place = "" if step is None else f", at step {step}"
    return printable(f"The run's own diagnosis{place}: {longest['details'].get('what')}.")


def _mean(values: Floats) -> float:
    """Return the mean over the epochs that have a value."""
    return float(np.nanmean(values))


def _times(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
