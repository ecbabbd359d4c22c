"""The arguments of `mimae bench tasks`."""

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

    A classifier beside timm's, a detector beside torchvision's Mask R-CNN, on small models and one thread.
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
