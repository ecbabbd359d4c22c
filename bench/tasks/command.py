"""The arguments of `mimae bench tasks` and `mimae bench starts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def tasks(
    rounds: Annotated[int, typer.Option(help="number of rounds, with a step of each contender in each", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write the result here")] = None,
) -> None:
    """Measure speed and memory of fine-tuning beside plain baselines.

    Classifiers beside timm's, a segmenter beside transformers' UperNet, a detector beside torchvision's Mask R-CNN, on
    small models and one thread.
    """
    import torch

    from mimae.bench.machine import describe
    from mimae.bench.tasks.tasks import CONTESTS, compete, show
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    torch.set_num_threads(1)
    found = {"bench": "tasks", **describe(torch.device("cpu")), "rounds": rounds}
    found["tasks"] = {task: compete(task, rounds) for task in CONTESTS}
    if out is not None:
        write_atomically(out, json.dumps(found, indent=1) + "\n")
    if not as_json(found):
        print(show(found))


def starts(
    recipe: Annotated[str | None, typer.Argument(help="a recipe that fine-tunes")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides for all starts")
    ] = None,
    start: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: KEY=VALUE ...'", help="a row, as 'MAE: model.init=runs/mae'; repeatable"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="number of threads", min=1)] = 1,
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="folder of the runs")] = Path("runs/starts"),
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="the file of the result")] = None,
    render_only: Annotated[bool, typer.Option("--render", help="only print the table of --out")] = False,
) -> None:
    """Fine-tune from several starts by the same recipe, and print a table of the measures.

    Finished runs are not trained again.
    """
    import torch

    from mimae.bench.tasks.starts import Start, Stopped, compare, table
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    if render_only:
        if out is None:
            raise UserError("--render needs --out FILE.json, the file whose table is printed")
        print(table(json.loads(out.read_text())))
        return
    if recipe is None or not start:
        raise UserError("mimae bench starts needs a recipe and at least one --start")
    torch.set_num_threads(threads)
    try:
        found = compare(recipe, overrides or (), [Start.of(each) for each in start], seeds, runs)
    except Stopped:
        print("stopped: the same command continues from here")
        raise typer.Exit(75) from None
    if out is not None:
        write_atomically(out, json.dumps(found, indent=1) + "\n")
    if not as_json(found):
        print(table(found))
