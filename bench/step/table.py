"""The result of `mimae bench step` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mimae.bench.step.contenders import OURS
from mimae.bench.step.operators import KINDS


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a result as tables."""
    machine = result["machine"]
    console.print(
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {result['versions']['torch']}, {result['date']}"
    )
    for precision, rates in result["roof"].items():
        square, layers = rates["square"] / 1e12, rates["layers"] / 1e12
        console.print(
            f"{precision} matrix products: {square:.3g} TFLOP/s large and square, {layers:.3g} as in the model"
        )
    for contest in result["contests"]:
        title = f"{contest['images']} images x {contest['views']} views, {contest['precision']}"
        if result["rounds"]:
            _show_speed(result, contest, title, console)
        memory = Table(title=f"memory, {title}")
        for column in ("", "attention", "kept for backward", "peak of all tensors", "peak of the process"):
            memory.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, row in contest["contenders"].items():
            counted = row.get("counted") or {}
            sizes = [counted.get("kept_bytes"), counted.get("peak_bytes"), row.get("peak_bytes")]
            memory.add_row(
                name, row["attention"] or "", *("" if size is None else f"{size / 2**20:,.0f} MiB" for size in sizes)
            )
        if any({"counted", "peak_bytes"} & row.keys() for row in contest["contenders"].values()):
            console.print(memory)
        for name, row in contest["contenders"].items():
            for key in ("peak_skipped", "counted_skipped"):
                if key in row:
                    console.print(f"{name} has no {key.removesuffix('_skipped')} memory: {row[key]}")


def _show_speed(result: Mapping[str, Any], contest: Mapping[str, Any], title: str, console: Console) -> None:
    rows = contest["contenders"]
    speed = Table(title=title)
    for column in ("", "images/s", f"a step, in steps of {OURS} (min .. max)", "TFLOP a step", "of the roof"):
        speed.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, row in rows.items():
        ratio, flops = row["ours_over_this"], row["flops_per_step"]
        seconds, rates = contest["images"] / row["images_per_s"], result["roof"].get(row["precision"])
        speed.add_row(
            name,
            f"{row['images_per_s']:.3g}",
            ""
            if name == OURS or ratio is None
            else f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})",
            f"{flops / 1e12:.3g}",
            "" if rates is None else f"{flops / seconds / rates['layers']:.0%}",
        )
    if contest["clock"] == "processor":
        speed.caption = "seconds are those of the processor, which runs one thread"
    console.print(speed)
    for name, reason in contest["skipped"].items():
        console.print(f"{name} left out: {reason}")
    kinds = Table(title="what the time of a step goes to")
    for column in ("", *KINDS, "other"):
        kinds.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, row in rows.items():
        if row["time_by_kind"] is not None:
            kinds.add_row(name, *(f"{share:.1%}" for share in row["time_by_kind"].values()))
    console.print(kinds)
