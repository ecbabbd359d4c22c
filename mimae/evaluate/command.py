"""The arguments of `mimae probe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def probe(
    run: Annotated[Path, typer.Argument(help="directory of a pretraining run")],
    train: Annotated[str | None, typer.Option(help="labelled training images [default: data.path]")] = None,
    test: Annotated[str | None, typer.Option(help="labelled test images [default: data.val_path]")] = None,
    images: Annotated[int, typer.Option(help="largest number of training images, class-balanced", min=1)] = 50_000,
    baselines: Annotated[bool, typer.Option(help="also probe raw pixels and the encoder before training")] = True,
) -> None:
    """Evaluate the frozen features of a run.

    Uses a linear probe, a probe with few labels, and nearest neighbours. Writes RUN/probe.json.
    """

    from rich.console import Console
    from rich.table import Table

    from mimae.evaluate.knn import NEIGHBOURS
    from mimae.evaluate.probe import MEASURES, probe
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    result = probe(run, train, test, images, baselines)
    write_atomically(run / "probe.json", json.dumps(result, indent=2) + "\n")
    if as_json(result):
        return
    table = Table(
        title=f"{run}: {result['train_images']:,} training and {result['test_images']:,} test images of "
        f"{result['classes']} classes",
        title_justify="left",
    )
    table.add_column("frozen features")
    for column in ("linear probe", f"{result['few_labels']} labels", f"{NEIGHBOURS} neighbours"):
        table.add_column(column, justify="right")
    for name, scores in result["features"].items():
        table.add_row(name, *(f"{scores[key]:.3f}" for key in MEASURES))
    Console().print(table)
    if result["unreadable_images"]:
        print(f"{result['unreadable_images']} images could not be read and were left out")
