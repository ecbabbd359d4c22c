"""Command-line arguments of `mimae data check` and `mimae data pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mimae.outside.text import say

MaxPixels = Annotated[int | None, typer.Option(help="as data.max_pixels [default: its default]", min=1)]
Workers = Annotated[int | None, typer.Option(help="processes [default: one per core]", min=1)]
ImageKey = Annotated[str | None, typer.Option(help="as data.image_key")]
LabelKey = Annotated[str | None, typer.Option(help="as data.label_key")]
White = Annotated[int | None, typer.Option("--range", help="as data.range", min=1, max=65535)]


def check(
    path: Annotated[str, typer.Argument(help="a data path, as data.path")],
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    white: White = None,
) -> None:
    """Read and decode every sample of a data set.

    Reports counts, sizes, formats, broken samples with the reason, and duplicates; with --json the path of every listed
    sample. The exit code is 1 if any sample is broken.
    """
    from mimae.data.loading.workers import default_workers
    from mimae.data.settings import PILLOW_LIMIT, DataSettings
    from mimae.data.tools.check import check, show, summary
    from mimae.outside.output import as_json

    pixels = min(max_pixels or DataSettings().max_pixels, PILLOW_LIMIT)
    settings = DataSettings(max_pixels=pixels, image_key=image_key, label_key=label_key, range=white)
    found = summary(check(path, settings, workers or default_workers()), white)
    if not as_json(found):
        show(found)
    if found["broken"]:
        raise typer.Exit(1)


def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a data path, as data.path")],
    target: Annotated[Path, typer.Argument(metavar="DST.tar", help="DIR/NAME.tar, for DIR/NAME-00000.tar, ...")],
    samples: Annotated[int, typer.Option(help="samples per shard", min=1)] = 5000,
    shortest: Annotated[int | None, typer.Option(help="resize larger images to this shortest side", min=1)] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="transcode JPEGs: the same pixels, whose crops are faster to decode")
    ] = False,
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    white: White = None,
) -> None:
    """Write a data set as tar shards.

    The order and the labels are kept. If packing was interrupted, run the same command again to resume it.
    """
    from mimae.data.loading.batch import DataError
    from mimae.data.loading.workers import default_workers
    from mimae.data.pixels import jpeg
    from mimae.data.settings import DataSettings
    from mimae.data.sources.open import open_source
    from mimae.data.tools.pack import Packing, pack
    from mimae.outside.output import as_json
    from mimae.outside.paths import user_path

    if target.suffix != ".tar":
        raise DataError(f"{target} cannot name the shards: give DIR/NAME.tar, for DIR/NAME-00000.tar and so on")
    folder = user_path(source)
    if folder.is_dir() and target.parent.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{target} is inside {source}, which could then not be opened: write the shards elsewhere")
    if lossless and shortest is not None:
        raise DataError("--lossless keeps the pixels and --shortest changes them: give one of the two")
    if lossless and (obstacle := jpeg.obstacle()) is not None:
        raise DataError(
            f"--lossless needs libjpeg-turbo, and {obstacle}: install it with its header (Debian: "
            "libjpeg62-turbo-dev), and install mimae again; `mimae doctor` shows whether it is found"
        )
    opened = open_source(source, settings=DataSettings(image_key=image_key, label_key=label_key))
    for note in opened.notes:
        say(note)
    packing = Packing(opened, target, samples, shortest, max_pixels or DataSettings().max_pixels, white, lossless)
    written, left_out = pack(packing, workers or default_workers())
    shards = packing.numbers()
    bad = target.with_suffix(".bad_samples.jsonl")
    if as_json({"shards": [packing.shard(i) for i in shards], "written": written, "left_out": left_out, "bad": bad}):
        return
    span = f"{packing.shard(0)} to {packing.shard(shards[-1]).name}"
    say(f"{span}: {written} written, {len(shards) - written} already there")
    if left_out:
        say(f"left out because they cannot be used: {left_out}, listed in {bad}")
