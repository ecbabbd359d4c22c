"""The result of `mimae bench step` as tables."""

from __future__ import annotations

import statistics
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
        rows = contest["contenders"]
        variants = contest["variants"]
        speed = Table(title=f"{contest['images']} images x {contest['views']} views, {contest['precision']}")
        faster = "faster than mimae by (min .. max)" if variants else "mimae is faster by (min .. max)"
        for column in ("", "images/s", faster, "TFLOP a step", "of the roof", "peak memory"):
            speed.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, row in rows.items():
            ratio, peak, flops = row["ours_over_this"], row["peak_bytes"], row["flops_per_step"]
            low, middle, high = ratio["min"], ratio["median"], ratio["max"]
            if variants:
                low, middle, high = 1 / high, 1 / middle, 1 / low
            seconds, limit = statistics.median(row["seconds_per_step"]), result["roof"][row["precision"]]["layers"]
            speed.add_row(
                name,
                f"{row['images_per_s']:.3g}",
                "" if name == OURS else f"{middle:.3f} ({low:.3f} .. {high:.3f})",
                f"{flops / 1e12:.3g}",
                f"{flops / seconds / limit:.0%}",
                "out of memory" if peak is None else f"{peak / 2**20:,.0f} MiB",
            )
        console.print(speed)
        for name, reason in contest["skipped"].items():
            console.print(f"{name} left out: {reason}")
        kinds = Table(title="what the time of a step goes to")
        for column in ("", *KINDS, "other"):
            kinds.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, row in rows.items():
            kinds.add_row(name, *(f"{share:.1%}" for share in row["time_by_kind"].values()))
        console.print(kinds)
