"""The arguments of `mimae probe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def probe(
    run: Annotated[Path, typer.Argument(help="a pretraining run, or one of its checkpoints")],
    train: Annotated[str | None, typer.Option(help="labelled training images [default: data.path]")] = None,
    test: Annotated[str | None, typer.Option(help="labelled test images [default: data.val_path]")] = None,
    images: Annotated[int, typer.Option(help="largest number of training images, class-balanced", min=1)] = 50_000,
    baselines: Annotated[bool, typer.Option(help="also probe raw pixels and the encoder before training")] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="[default: RUN/probe.json, or RUN/probe-CHECKPOINT.json]")
    ] = None,
) -> None:
    """Evaluate the frozen features of a run.

    Uses a linear probe, a probe with few labels, and nearest neighbours. Prints the results, then writes them.
    """
    from mimae.checkpoints.checkpoint import run_of
    from mimae.evaluate.probe import probe
    from mimae.outside.files import write_report
    from mimae.outside.output import as_json

    result = probe(run, train, test, images, baselines)
    if not as_json(result):
        _print(run, result)
    whole = run_of(run)
    name = "probe.json" if whole == run else f"probe-{result['checkpoint']}.json"
    write_report(whole, name, json.dumps(result, indent=2) + "\n", out)


def _print(run: Path, result: dict[str, Any]) -> None:
    """Print the table of a probe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mimae.evaluate.knn import NEIGHBOURS
    from mimae.evaluate.probe import MEASURES
    from mimae.outside.text import as_file, printable, say

    title = (
        f"{run}: {result['train_images']:,} training and {result['test_images']:,} test images of "
        f"{result['classes']} classes"
    )
    table = Table(title=Text(printable(title), "table.title"), title_justify="left")
    table.add_column("frozen features")
    for column in ("linear probe", f"{result['few_labels']} labels", f"{NEIGHBOURS} neighbours"):
        table.add_column(column, justify="right")
    for name, scores in result["features"].items():
        table.add_row(name, *(f"{scores[key]:.3f}" for key in MEASURES))
    Console(file=as_file()).print(table)
    if result["unreadable_images"]:
        say(f"{result['unreadable_images']} images could not be read and were left out")
