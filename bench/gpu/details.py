"""The tables of docs/gpu-day.md below the list of stages: a row for everything of a kind that the results hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mimae.telemetry.records import PHASES

Results = Mapping[str, Mapping[str, Any]]
"""The results of stages, by their names."""

Row = Sequence[str]


def sections(results: Results) -> list[str]:
    """Return the lines of all tables that have a row."""
    lines: list[str] = []
    for title, columns, rows in _TABLES:
        if cells := [f"| {' | '.join(map(_plain, row))} |" for row in rows(results)]:
            lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|", *cells]
    return lines


def _plain(cell: str) -> str:
    """Return a text that fits into a cell."""
    return " ".join(cell.replace("|", "\\|").split())


def _number(value: float | None, unit: float = 1.0, form: str = ",.0f") -> str:
    return "" if value is None else format(value / unit, form)


def _rates(results: Results) -> Iterator[Row]:
    found = results.get("compile", {})
    for name, rate in found.get("roof", {}).items():
        is_copy = name.startswith("copy")
        yield (
            ("copy", f"{rate / 1e9:,.0f} GB")
            if is_copy
            else (f"{name[:4]} products, square", f"{rate / 1e12:,.0f} TFLOP")
        )
    for precision, rates in found.get("roof_of_step", {}).items():
        yield f"{precision} products, as in ViT-B's step", f"{rates['layers'] / 1e12:,.0f} TFLOP"


def _contests(results: Results, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for stage, result in results.items():
        if result.get("bench") == kind:
            yield from ((stage, contest) for contest in result.get("contests", []))


def _steps(results: Results) -> Iterator[Row]:
    for stage, contest in _contests(results, "step"):
        skipped = contest.get("skipped", {})
        for name in dict.fromkeys([*contest["contenders"], *skipped]):
            row = contest["contenders"].get(name, {})
            ratio = (row.get("ours_over_this") or {}).get("median")
            agreement = contest.get("agreement", {}).get(name, {})
            yield (
                stage,
                name,
                _number(row.get("images_per_s")),
                _number(ratio, form=".3f"),
                row.get("attention") or "",
                ", ".join(f"{each['grad_norm']:.0e} ({precision})" for precision, each in agreement.items()),
                _number(row.get("peak_bytes"), 2**30, ".1f"),
                skipped.get(name, "") or row.get("peak_skipped", ""),
            )
        if "uncompiled_seconds" in contest:
            yield stage, "before compilation", _number(contest["images"] / contest["uncompiled_seconds"]), *[""] * 5


def _ops(results: Results) -> Iterator[Row]:
    for _, contest in _contests(results, "kernels"):
        for name, row in contest["contenders"].items():
            forward, both = (row.get(kind, {}).get("median") for kind in ("forward", "both"))
            yield (
                contest["op"],
                f"{contest['size']}, {contest['precision']}",
                f"{contest['batch']:,}",
                name,
                _number(forward, 1e-3, ".3f"),
                _number(both, 1e-3, ".3f"),
                _number(row.get("extra_bytes"), 2**20),
                row["skipped"] or "",
            )


def _runs(results: Results) -> Iterator[Row]:
    for stage, result in results.items():
        clocks = [gpu for reading in result.get("clocks", []) for gpu in reading or ()]
        clock = f"{clocks[-1]['clocks.sm']} of {clocks[-1]['clocks.max.sm']}" if clocks else ""
        chosen = ", ".join(str(each) for each in result.get("chosen", {}).values())
        # A run that was cut off has no epoch.
        for record in result.get("epochs", [])[-1:] or ([{}] if "clocks" in result else []):
            yield (
                stage,
                *(_number(record.get(f"seconds_{phase}"), form=".2f") for phase in PHASES),
                _number(record.get("seconds"), form=".1f"),
                _number(record.get("mem_peak_bytes"), 2**30, ".1f"),
                chosen,
                clock,
            )


def _phases(results: Results) -> Iterator[Row]:
    for name, phase in results.get("trace", {}).get("phases", {}).items():
        seconds = (phase[f"{kind}_seconds"] for kind in ("forward", "backward"))
        yield name, *(_number(each, 1e-3, ".2f") for each in seconds), _number(phase["launches"])


def _broken(results: Results) -> Iterator[Row]:
    for row in results.get("compile", {}).get("machine_code", []):
        if "error" in row:
            yield row["op"], row["kernel"], row["size"], row["error"]


_OF_STEPS = ("stage", "contender", "images/s", "its time over ours", "attention", "differs by", "peak, GiB", "left out")
_OF_OPS = ("op", "size", "images", "form", "forward, ms", "both, ms", "extra, MiB", "left out")
_OF_RUNS = ("stage", *(f"{phase}, s" for phase in PHASES), "epoch, s", "peak, GiB", "chosen", "clock")

_TABLES: tuple[tuple[str, Row, Callable[[Results], Iterator[Row]]], ...] = (
    ("Rates of the GPU", ("", "per second"), _rates),
    ("Steps", _OF_STEPS, _steps),
    ("Ops", _OF_OPS, _ops),
    ("Pretraining", _OF_RUNS, _runs),
    ("Phases of a step", ("phase", "forward, ms", "backward, ms", "launches"), _phases),
    ("Kernels that do not compile", ("op", "kernel", "size", "reason"), _broken),
)
"""Title, columns and rows of each table."""
