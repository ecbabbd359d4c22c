"""The arguments of `mimae bench gpu`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def gpu(
    json_file: Annotated[Path, typer.Option("--json", help="the file to write")] = Path("bench/results/gpu.json"),
    only: Annotated[list[str] | None, typer.Option(help="stages to run; repeatable [default: all]")] = None,
) -> None:
    """Run all that needs a GPU, into one JSON file.

    Takes under eight minutes.
    """

    import torch

    from mimae.bench.gpu import STAGES, run_all
    from mimae.bench.machine import describe
    from mimae.errors import UserError

    names = [stage.name for stage in STAGES]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: legal is {', '.join(map(repr, names))}")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: `mimae bench kernels` and `mimae bench step` run on a CPU too")
    stages = [stage for stage in STAGES if stage.name in (only or names)]
    failed = run_all(stages, json_file, describe(torch.device("cuda")))
    if failed:
        print(f"not finished: {', '.join(failed)}; their last lines are in {json_file}", file=sys.stderr)
        raise typer.Exit(1)
