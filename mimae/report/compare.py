"""Comparison of runs: differing settings, then curves and figures; also with a stored baseline."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimae import __version__
from mimae.errors import UserError
from mimae.outside.files import write_atomically
from mimae.outside.reading import read_text
from mimae.outside.text import printable
from mimae.report import plots, runs
from mimae.report.curves import thinned
from mimae.report.figures import Change, Figure, compare, figures, from_json, spread, to_json
from mimae.report.html import Html, join, table, tag
from mimae.report.page import document
from mimae.report.plots import Line

_OWN = ("seed", "run.dir")
"""Settings that differ between runs of the same group."""

_AT = (0.1, 0.25, 0.5, 1.0)
"""Shares of the steps that all runs have in common, at which their curves are compared."""

_BASELINE_BYTES = 1 << 24

_EQUAL = "The settings are equal except for the seed, and the machine is the same."


class Summary(NamedTuple):
    """The part of a run that is compared and stored in a baseline."""

    name: str
    settings: dict[str, str]
    machine: dict[str, str]
    figures: dict[str, Figure]
    run: runs.Run | None = None
    """The run itself; None if only its summary in a baseline is known."""


class Group(NamedTuple):
    """Runs that differ only in the seed."""

    name: str
    members: list[Summary]

    def figure(self, key: str) -> list[Figure]:
        return [member.figures[key] for member in self.members if key in member.figures]


class Comparison(NamedTuple):
    """A comparison of groups of runs. The first group is the reference."""

    groups: list[Group]
    differences: list[tuple[str, list[str]]]
    """Settings, and facts about the machine, that differ between groups; "" if a group lacks one."""
    keys: list[str]
    """Names of the figures, in order."""
    changes: dict[tuple[str, str], Change]
    """Changes by group and figure."""

    @property
    def regressions(self) -> list[tuple[str, str, Change]]:
        return [(group, key, change) for (group, key), change in self.changes.items() if change.is_regression]

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Runs and figures of the first group that they lack, for example because a loss is not finite."""
        first, *rest = self.groups
        known = [key for key in self.keys if first.figure(key)]
        members = (member for group in rest for member in group.members)
        return [(member.name, key) for member in members for key in known if key not in member.figures]


def summary(path: Path) -> Summary:
    """Read the summary of a run. Raises UserError if there is no run."""
    run = runs.read(path)
    settings = {each.key: each.value for each in run.settings}
    machine = {key: str(value) for key, value in runs.leaves(run.environment) if key != "git.commit"}
    return Summary(run.name, settings, machine, figures(run), run)


def contrast(summaries: Sequence[Summary], reference: Sequence[Summary] = (), *, tolerance: float) -> Comparison:
    """Compare runs with the runs of a baseline, or else with the group of the first run.

    A group consists of runs that differ only in the seed. Raises UserError for a run that is named twice, which would
    count as two runs without any spread.
    """
    paths = Counter(each.run.path.resolve() for each in summaries if each.run is not None)
    if twice := [path for path, count in paths.items() if count > 1]:
        raise UserError(f"{twice[0]} is named twice; legal is each run once")
    groups = [*([Group("baseline", list(reference))] if reference else []), *_groups(summaries)]
    first, *rest = groups
    keys = list(dict.fromkeys(key for group in groups for member in group.members for key in member.figures))
    changes = {
        (group.name, key): compare(first.figure(key), group.figure(key), tolerance)
        for group in rest
        for key in keys
        if first.figure(key) and group.figure(key)
    }
    return Comparison(groups, _differences(groups), keys, changes)


def save(path: Path, summaries: Sequence[Summary]) -> None:
    """Save runs as a baseline.

    Raises UserError if the runs differ in more than the seed, or have nothing to compare, and OSError if the file
    cannot be written.
    """
    for each in summaries:
        if not each.settings or not each.figures:
            lacks = "no figure yet" if each.settings else "no recipe that can be read"
            raise UserError(f"{each.name} has {lacks}, so it cannot be a baseline")
    if differing := _differences(_groups(summaries)):
        keys = ", ".join(key for key, _ in differing[:5])
        raise UserError(f"the runs of a baseline may differ only in the seed; these differ in {keys}")
    kept = [
        {
            "name": each.name,
            "settings": each.settings,
            "machine": each.machine,
            "figures": {key: to_json(figure) for key, figure in each.figures.items()},
        }
        for each in summaries
    ]
    write_atomically(path, json.dumps({"mimae": __version__, "baseline": kept}, indent=1) + "\n")


def load(path: Path) -> list[Summary]:
    """Read a baseline: a file that `save` wrote, or a run. Raises UserError if it is neither, or has no figures."""
    found = [summary(path)] if path.is_dir() else _read(path)
    if not any(each.figures for each in found):
        raise UserError(f"the baseline {path} has no figures, so nothing can be compared with it")
    return found


def _read(path: Path) -> list[Summary]:
    try:
        found = json.loads(read_text(path, _BASELINE_BYTES))["baseline"]
        return [
            Summary(
                str(each["name"]),
                {str(key): str(value) for key, value in each["settings"].items()},
                {str(key): str(value) for key, value in each["machine"].items()},
                {str(key): from_json(value) for key, value in each["figures"].items()},
            )
            for each in found
        ]
    except OSError as error:
        raise UserError(f"the baseline {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a baseline ({type(error).__name__}); mimae compare RUN... --save FILE writes one"
        ) from error


def as_text(found: Comparison) -> str:
    """Return a comparison for a terminal."""
    parts = []
    names = [group.name for group in found.groups]
    if found.differences:
        rows = [[key, *values] for key, values in found.differences]
        parts.append("Differences\n" + _aligned([["", *names], *rows]))
    else:
        parts.append(_EQUAL)
    parts += [f"The recipe of {printable(name)} cannot be read." for name in _unknown(found.groups)]
    if curves := _at_steps(found.groups):
        parts.append("Losses during training (means over a group's runs and 5 % of the steps)\n" + _aligned(curves))
    rows = [["", *names]]
    for key in found.keys:
        rows.append([key, *(_cell(found, group, key, place > 0) for place, group in enumerate(found.groups))])
    parts.append("Figures (mean ± deviation over runs; change from the first column)\n" + _aligned(rows))
    return "\n\n".join(parts)


def verdict(found: Comparison, tolerance: float) -> str:
    """Return a text that says whether some figure is worse than the baseline."""
    told = [
        f"  {key} of {group}: worse by {change.worse:.1%}; noise explains {change.error:.1%} ({change.by})"
        for group, key, change in found.regressions
    ]
    lines = ["worse than the baseline:", *told] if told else []
    if missing := [f"  {key} of {run}" for run, key in found.missing]:
        lines += ["the baseline has figures that are missing here:", *missing]
    lines = lines or [f"no figure is worse than the baseline by {tolerance:.0%} or more, beyond its noise"]
    return "\n".join(printable(line) for line in lines)


def as_dict(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values."""
    return {
        "groups": [
            {
                "name": group.name,
                "runs": [member.name for member in group.members],
                "figures": {key: [each.value for each in group.figure(key)] for key in found.keys},
            }
            for group in found.groups
        ],
        "differences": dict(found.differences),
        "missing": [{"run": run, "figure": key} for run, key in found.missing],
        "changes": [{"group": group, "figure": key, **each._asdict()} for (group, key), each in found.changes.items()],
    }


def as_page(found: Comparison) -> str:
    """Return a comparison as an HTML page, with the curves of all runs in the same plots."""
    names = tuple(group.name for group in found.groups)
    known = [
        (f"{group.name}/{member.name}" if len(group.members) > 1 else group.name, member.run)
        for group in found.groups
        for member in group.members
        if member.run is not None
    ][:8]
    columns = list(dict.fromkeys(key for _, run in known for key in (*run.losses, "lr", "grad_norm", "images_per_s")))
    drawn = [
        plots.lines(key, [Line(name, thinned(run.steps["step"], run.steps[key])) for name, run in known], unit="")
        for key in columns
    ]
    drawn += [
        plots.lines(
            key,
            [Line(name, thinned(*run.by_epoch(key))) for name, run in known],
            x_label="epoch",
        )
        for key in dict.fromkeys(key for _, run in known for key in (*run.directions, "mem_peak_bytes", "mfu"))
    ]
    rows = [
        (key, *(_cell(found, group, key, place > 0) for place, group in enumerate(found.groups))) for key in found.keys
    ]
    body = join(
        tag("header", tag("h1", " · ".join(names)), tag("p", "comparison of runs", class_="state")),
        tag(
            "section",
            tag("h2", "Differences"),
            _differing(found, names),
            *(tag("p", f"The recipe of {name} cannot be read.") for name in _unknown(found.groups)),
        ),
        tag("section", tag("h2", "Figures"), table(("figure", *names), rows, numeric=len(names))),
        tag("section", tag("h2", "Curves"), *drawn),
    )
    return document("comparison", body)


def _groups(summaries: Sequence[Summary]) -> list[Group]:
    """Group runs that differ only in the seed."""
    found: dict[str, list[Summary]] = {}
    for each in summaries:
        same = json.dumps([pair for pair in sorted(each.settings.items()) if pair[0] not in _OWN])
        # Runs whose recipes cannot be read may differ in anything.
        same = same if each.settings else f"unknown {len(found)}"
        found.setdefault(same, []).append(each)
    names: dict[str, int] = {}
    groups = []
    for members in found.values():
        name = members[0].name if len(members) == 1 else f"{members[0].name} (+{len(members) - 1} seeds)"
        names[name] = names.get(name, 0) + 1
        groups.append(Group(name if names[name] == 1 else f"{name} #{names[name]}", members))
    return groups


def _differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Return the settings and facts that differ; a group about which nothing is known differs in nothing."""
    found = []
    for read in (lambda each: each.settings, lambda each: each.machine):
        every = [read(group.members[0]) for group in groups]
        known = [each for each in every if each]
        for key in dict.fromkeys(key for each in known for key in each):
            if key not in _OWN and len({each.get(key, "") for each in known}) > 1:
                found.append((key, [each.get(key, "") for each in every]))
    return found


def _at_steps(groups: Sequence[Group]) -> list[list[str]]:
    """Return the rows of a table of losses at some shares of the steps that all runs have in common."""
    known = [group for group in groups if all(member.run is not None for member in group.members)]
    members = [member.run for group in known for member in group.members if member.run is not None]
    last = min((run.step for run in members), default=0)
    if len(known) < 2 or not last:
        return []
    keys = [key for key in members[0].losses if all(run.steps.has(key) for run in members)]
    rows = [["", *(group.name for group in known)]]
    for key in keys:
        for step in (last * share for share in _AT):
            near = [
                np.mean([_near(member.run, key, step, last) for member in group.members if member.run is not None])
                for group in known
            ]
            rows.append([f"{key} at step {step:,.0f}", *(f"{mean:.4g}" for mean in near)])
    return rows


def _near(run: runs.Run, key: str, step: float, last: int) -> float:
    """Return the mean of a column over 5 % of the steps up to `step`."""
    steps = run.steps["step"]
    near = run.steps[key][(steps <= step) & (steps > step - max(last / 20, 1))]
    near = near[np.isfinite(near)]
    return float(near.mean()) if len(near) else math.nan


def _cell(found: Comparison, group: Group, key: str, is_changed: bool) -> str:
    values = group.figure(key)
    if not values:
        return "–"
    factor, unit = (2**-20, " MiB") if key.endswith("_bytes") else (1.0, "")
    told = f"{factor * float(np.mean([each.value for each in values])):.5g}"
    deviation = spread(values)
    told += f" ± {factor * deviation:.2g}" if math.isfinite(deviation) else ""
    unit += f" ({len(values)} of {len(group.members)} runs)" if len(values) < len(group.members) else ""
    change = found.changes.get((group.name, key)) if is_changed else None
    if change is None:
        return told + unit
    word = "worse" if change.worse > 0 else "better"
    return f"{told}{unit} ({abs(change.worse):.1%} {word}{', regression' if change.is_regression else ''})"


def _differing(found: Comparison, names: tuple[str, ...]) -> Html:
    if not found.differences:
        return tag("p", _EQUAL)
    return table(("key", *names), [(key, *values) for key, values in found.differences])


def _unknown(groups: Sequence[Group]) -> list[str]:
    """Return the names of the runs whose recipes cannot be read."""
    return [member.name for group in groups for member in group.members if not member.settings]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
