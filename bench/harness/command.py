"""The arguments of `mimae drill`, `mimae bench soak`, `flat` and `fuzz`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def drill(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="overrides of the recipe: engine.kind=fsdp"),
    ] = None,
    task: Annotated[str, typer.Option(help="task of the runs: pretrain, classify or segment")] = "pretrain",
    faults: Annotated[int, typer.Option(help="number of faults", min=1)] = 40,
    ranks: Annotated[int, typer.Option(help="largest number of ranks of a run", min=2, max=4)] = 3,
    seed: Annotated[int, typer.Option(help="seed of the draw of kinds, steps, ranks and moments")] = 0,
    jobs: Annotated[int, typer.Option(help="number of runs at a time", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="the file to write")] = None,
) -> None:
    """Inject every kind of fault into tiny runs, and compare their weights.

    Exits with 1 if a fault did not fire, a checkpoint was lost or weights differ.
    """
    import shutil
    import signal
    import tempfile
    import time

    import torch

    from mimae.bench.harness import mounts
    from mimae.bench.harness.drill import TOLERANCE, choose, drill, end, no_copies, pass_on_hangups
    from mimae.bench.harness.faults import COPIED, FAULTS, MOUNTED
    from mimae.bench.harness.subjects import SUBJECTS
    from mimae.bench.machine import describe
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    if task not in SUBJECTS:
        raise UserError(f"--task {task}: legal are {', '.join(SUBJECTS)}")
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    pass_on_hangups()
    obstacles = {MOUNTED: mounts.obstacle(), COPIED: no_copies(SUBJECTS[task], overrides or ())}
    kinds = list(FAULTS)
    for left_out, obstacle in obstacles.items():
        if obstacle is not None:
            print(f"without {' and '.join(left_out)}: {obstacle}")
            kinds = [kind for kind in kinds if kind not in left_out]
    folder = Path(tempfile.mkdtemp(prefix="mimae-drill-"))
    began = time.monotonic()
    print(f"{'fault':<30} {'step':>4} {'ranks':>5} {'starts':>6} {'lost':>4} {'equal':>6} {'s':>6}  seen")
    rows = drill(SUBJECTS[task], choose(kinds, faults, seed), ranks, seed, jobs, overrides or (), folder)
    failed, lost = sum(row["failed"] is not None for row in rows), sum(row["lost"] for row in rows)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(rows)} faults, {failed} failed, {lost} checkpoints lost, {minutes:.1f} minutes")
    found = {"bench": "drill", **describe(torch.device("cpu")), "task": task, "seed": seed}
    found |= {
        "overrides": overrides or [],
        "tolerance": TOLERANCE,
        "minutes": round(minutes, 1),
        "failed": failed,
        "lost": lost,
        "faults": rows,
    }
    as_json(found)
    if out is not None:
        write_atomically(out, json.dumps(found, indent=1) + "\n")
    if failed or lost:
        print(f"the output of the runs is kept in {folder}")
        raise typer.Exit(1)
    shutil.rmtree(folder)


def soak(
    path: Annotated[str, typer.Argument(help="the images, as in data.path")],
    loader: Annotated[list[str] | None, typer.Option(help="data.loader; repeatable [default: all usable]")] = None,
    minutes: Annotated[float, typer.Option(help="minutes for each loader", min=0.01)] = 10.0,
    bad: Annotated[float, typer.Option(help="share of reads that are damaged", min=0, max=1)] = 0.01,
    size: Annotated[int, typer.Option(help="side of a sample in pixels", min=1)] = 224,
    batch: Annotated[int, typer.Option(help="images of a batch", min=1)] = 64,
    restart: Annotated[float, typer.Option(help="seconds between two restarts", min=0.1)] = 60.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="the file to write")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="the plot to write (.png or .svg)")] = None,
) -> None:
    """Run loaders for minutes while random reads are damaged.

    Exits with 1 if a slot was lost or repeated.
    """

    import torch

    from mimae.bench.harness.soak import plot, soak
    from mimae.bench.machine import describe
    from mimae.data.loading.backend import OBSTACLES
    from mimae.data.settings import DataSettings
    from mimae.data.sources.open import open_source
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    source = open_source(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = loader or [name for name, obstacle in OBSTACLES.items() if obstacle(device) is None]
    if unknown := sorted({*names} - {*OBSTACLES}):
        raise UserError(f"--loader {unknown[0]}: legal are {', '.join(OBSTACLES)}")
    found: dict[str, Any] = {"bench": "soak", **describe(device), "minutes": minutes, "bad": bad, "loaders": {}}
    for name in names:
        settings = DataSettings(path=path, image_size=size, loader=name, max_bad_fraction=1.0)
        result = found["loaders"][name] = soak(settings, source, batch, minutes, bad, restart)
        print(
            f"{name}: {result['images']:,} images in {result['epochs']:,} whole epochs, {result['restarts']} restarts; "
            f"{result['lost']} slots lost, {result['repeated']} repeated, {result['replaced']:,} replaced, "
            f"{result['unnamed']} of them not named; memory by quarters of the time "
            f"{', '.join(f'{mib:.0f}' for mib in result['quarters_mib'])} MiB",
            flush=True,
        )
    as_json(found)
    if out is not None:
        write_atomically(out, json.dumps(found) + "\n")
    if picture is not None:
        plot(found, picture)
    if any(result[key] for result in found["loaders"].values() for key in ("lost", "repeated", "unnamed")):
        raise typer.Exit(1)


def fuzz(
    kinds: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND]...", help="kinds of input [default: all]")
    ] = None,
    count: Annotated[int, typer.Option(help="number of inputs of each kind", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    first: Annotated[int, typer.Option(help="number of the first input", min=0)] = 0,
    case: Annotated[
        list[Path] | None, typer.Option(help="a kept input to try, before any kinds that are named; repeatable")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="folder for the inputs that are finds")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="the file to write, or, with counts so far, to go on with"),
    ] = None,
) -> None:
    """Use damaged inputs of every kind, each in a separate child process.

    Each has to be used, or refused with a message. Exits with 1 if one ends in a traceback, a hang, too much memory, a
    wrong count or a write outside its folder.
    """
    import os
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Before torch is imported: children are forked.

    from mimae.bench.harness.fuzz.fuzz import KINDS, SLICE, add, fuzz, merged, read, repeat
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json
    from mimae.outside.text import say

    if not sys.platform.startswith("linux"):
        raise UserError("mimae bench fuzz needs Linux: it reads /proc")
    if unknown := sorted({*(kinds or ())} - {*KINDS}):
        raise UserError(f"{unknown[0]} is not a kind of input: legal are {', '.join(KINDS)}")
    others, counts = 0, dict[str, Any]()
    for file in case or ():
        kind, outcome = repeat(file)
        say(f"{file.name}: {kind}, {outcome.verdict}{f': {outcome.said}' if outcome.said else ''}")
        others += outcome.is_find
    for kind in kinds or (() if case else KINDS):
        found = read(out, kind, seed, first)
        for start_of_slice in range(first, first + count, SLICE):
            found = add(found, fuzz(kind, seed, start_of_slice, min(SLICE, first + count - start_of_slice), keep, say))
            if out is not None:
                write_atomically(out, merged(out, kind, found))
        say(
            f"{kind:<12}"
            + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items() if key != "finds")
        )
        others += found["others"]
        counts[kind] = found
    as_json(counts)
    if others:
        raise typer.Exit(1)


def flat(
    steps: Annotated[int, typer.Option(help="optimizer steps", min=400)] = 5000,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="the file to write")] = None,
) -> None:
    """Train thousands of tiny steps, and watch the process.

    Exits with 1 where memory, file descriptors or threads grow, or the records by more and more bytes a step.
    """
    import tempfile

    import torch

    from mimae.bench.harness.flat import flat
    from mimae.bench.machine import describe
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    with tempfile.TemporaryDirectory(prefix="mimae-flat-") as folder:
        found = flat(steps, Path(folder))
    for name, quarters in found.items():
        if isinstance(quarters, list) and name not in ("seen", "columns"):
            print(f"{name.replace('_', ' ')} by quarters of the steps: {', '.join(f'{each:g}' for each in quarters)}")
    found = {"bench": "flat", **describe(torch.device("cpu")), **found}
    as_json(found)
    if out is not None:
        write_atomically(out, json.dumps(found) + "\n")
    if not found["flat"]:
        raise typer.Exit(1)
