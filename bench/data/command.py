"""The arguments of `mimae bench data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def data(
    path: Annotated[str, typer.Argument(help="the images, as in data.path")],
    size: Annotated[int, typer.Option(help="side of a sample in pixels", min=1)] = 224,
    batch: Annotated[int, typer.Option(help="number of images in a batch", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="number of workers of every loader; 0: the best of a sweep", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="number of interleaved rounds of each loader", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="seconds of a round", min=0.1)] = 6.0,
    only: Annotated[list[str] | None, typer.Option(help="a loader to measure; repeatable [default: all]")] = None,
    recipe: Annotated[str, typer.Option(help="recipe to compare the best loader with")] = "vit_base_400ep",
    gpu: Annotated[str, typer.Option(help="the GPU of this comparison")] = "NVIDIA H100",
    mfu: Annotated[float, typer.Option(help="assumed share of the GPU's peak", min=0.01, max=1)] = 0.45,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="the file to write")] = None,
    packed: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="the same images in another form; repeatable")
    ] = None,
) -> None:
    """Measure images per second of every loader on PATH.

    Compares them with torchvision's and other loaders, also by the differences of their pixels.
    """
    import statistics

    import torch

    from mimae.bench.data.data import encoded_sizes, fed, measure, sweep, table
    from mimae.bench.data.feeds import CONTENDERS, Job, obstacle
    from mimae.bench.machine import describe
    from mimae.data.loading.backend import OBSTACLES
    from mimae.data.loading.workers import default_workers
    from mimae.data.settings import DataSettings
    from mimae.data.sources.open import open_source
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    source = open_source(path)
    if len(source) < batch:
        raise UserError(f"{path} has {len(source)} images, fewer than a batch of {batch}: lower --batch")
    if unknown := sorted({*(only or ())} - {*CONTENDERS}):
        raise UserError(f"--only {unknown[0]}: legal are {', '.join(CONTENDERS)}")
    if wrong := [each for each in packed or () if "=" not in each]:
        raise UserError(f"--packed {wrong[0]}: legal is NAME=PATH, for example lossless=packed/lossless")
    forms = {name: open_source(place) for name, _, place in (each.partition("=") for each in packed or ())}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = Job(source, DataSettings(path=path, image_size=size), batch, 1)
    obstacles = {name: obstacle(name, source, device) for name in only or CONTENDERS}
    names = [name for name, reason in obstacles.items() if reason is None]
    for name, reason in obstacles.items():
        if reason is not None:
            print(f"{name} is left out: {reason}")
    cores = default_workers()
    counts = [workers] if workers else sweep(cores)
    results = measure(names, job, counts, rounds, seconds, lambda text: print(text, flush=True), forms)
    rate = max((results[name]["images_per_s"] for name in names if name in OBSTACLES), default=0.0)
    feeds = fed(rate, recipe, gpu, mfu)
    found = {
        "bench": "data",
        **describe(device),
        "source": {"images": len(source), "bytes_mean": statistics.fmean(encoded_sizes(source))},
        "settings": {"image_size": size, "batch": batch, "rounds": rounds, "seconds": seconds},
        "left_out": {name: reason for name, reason in obstacles.items() if reason},
        "loaders": results,
        "feeds": feeds,
    }
    if out is not None:
        write_atomically(out, json.dumps(found, indent=2) + "\n")
    if as_json(found):
        return
    print("\n".join(table(results)))
    print(
        "cold: images/s of the first pass, the files out of the page cache where the system allows it; off: mean "
        "difference from torchvision's antialiased bicubic on the same windows, of 255"
    )
    print(
        f"{rate:,.0f} images/s with {cores} cores feed {feeds['gpus']:.2f} x {gpu} that train {recipe} at an assumed "
        f"{100 * mfu:.0f} % of peak, {feeds['images_per_s_each']:,.0f} images/s each"
    )
