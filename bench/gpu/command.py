"""The arguments of `mimae bench gpu`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def gpu(
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="the file to write, and to go on with")] = Path(
        "bench/results/gpu.json"
    ),
    only: Annotated[list[str] | None, typer.Option(help="stages to run; repeatable [default: all]")] = None,
    seconds: Annotated[float, typer.Option(help="time of this call, from the start of its process", min=30)] = 540,
    page: Annotated[
        Path | None, typer.Option("--render", help="write what the file holds as this page, and run nothing")
    ] = None,
) -> None:
    """Run all that needs a GPU, into one JSON file, within a given time.

    The stages come in the order of what they are worth. The same command goes on with those that are left.
    """
    import json

    from mimae.bench.gpu.stages import STAGES
    from mimae.outside.output import as_json

    if page is not None:
        from mimae.bench.gpu.page import render

        page.write_text(render(json.loads(out.read_text()) if out.exists() else {}))
        as_json({"page": page})
        return
    import torch

    from mimae.bench.gpu.run import Run
    from mimae.bench.machine import describe, process_age
    from mimae.errors import UserError

    names = [stage.name for stage in STAGES]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: legal is {', '.join(map(repr, names))}")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: `mimae bench kernels` and `mimae bench step` run on a CPU too")
    stages = [stage for stage in STAGES if stage.name in (only or names)]
    machine = describe(torch.device("cuda"))
    states = Run(stages, out, machine, seconds - process_age()).run()
    as_json({"stages": states, "file": out})
    left = {name: state or "not started" for name, state in states.items() if state != "done"}
    if left:
        told = ", ".join(f"{name} ({state})" for name, state in left.items())
        print(f"not done: {told}; the same command goes on with them, {out} has their output", file=sys.stderr)
        raise typer.Exit(1)
