"""The commands that use a trained encoder or draw its outputs: export, embed, reconstruct, neighbours, map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Weights = Annotated[Path, typer.Argument(metavar="RUN", help="a run, one of its checkpoints, or an export")]
Average = Annotated[bool, typer.Option("--average", help="the moving average of the weights")]


def export(
    run: Annotated[Path, typer.Argument(help="a run, or one of its checkpoints")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to write; it must not exist")],
    to: Annotated[
        Literal["timm", "transformers", "mae", "onnx", "torch", "safetensors"], typer.Option(help="export format")
    ] = "timm",
    average: Average = False,
    decoder: Annotated[bool, typer.Option("--decoder", help="export MAE's decoder too (transformers, mae)")] = False,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="dtype of the stored weights")] = "fp32",
    blocks: Annotated[
        str | None, typer.Option(metavar="3,5,7,11", help="blocks, counted from 0, whose maps a graph outputs too")
    ] = None,
    given: Annotated[Literal["uint8", "float"], typer.Option("--input", help="dtype of a graph's input")] = "uint8",
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="a graph takes images of any size")] = False,
) -> None:
    """Write the model of a run as a folder that other libraries open without mimae.

    The model is an encoder, a classifier or a segmenter.

    The folder has a model card, and a check.py that compares the outputs with the model's on any machine.
    """
    import torch

    from mimae.model.portable import Form
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.transfer.export import BOUND, TARGETS
    from mimae.transfer.export import export as run_export
    from mimae.transfer.targets.base import Options

    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    options = Options(kind, decoder, Form(given, numbers("--blocks", blocks), dynamic_size))
    report = run_export(run, to, out, options, average)
    if as_json({"to": to, "bound": BOUND, **report._asdict()}):
        return
    say(f"{report.folder}: step {report.step:,} of {run}, for {TARGETS[to].title}")
    if report.rounding is not None:
        say(f"rounding to bf16 changed its outputs by {report.rounding:.2%}")
    if report.differences is None:
        say(f"not compared: {TARGETS[to].title} is not installed here; run check.py on a machine that has it")
    else:
        told = ", ".join(f"{name} {worst:.1e}" for name, worst in report.differences.items())
        say(f"differs from the model by at most: {told} (allowed: {BOUND:.0e})")


def embed(
    weights: Weights,
    data: Annotated[str, typer.Argument(metavar="PATH", help="images, in any form of data.path")],
    out: Annotated[Path, typer.Option(help="FILE.npz, FILE.parquet, or a folder of safetensors")],
    what: Annotated[
        Literal["pooled", "class", "tokens", "maps"],
        typer.Option(help="mean of the patch tokens, class token, all patch tokens, or maps of --blocks"),
    ] = "pooled",
    blocks: Annotated[str | None, typer.Option(metavar="3,5,7,11", help="blocks for maps, counted from 0")] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="dtype of the stored features")] = "float32",
    batch: Annotated[int, typer.Option(help="images per batch", min=1)] = 64,
    average: Average = False,
    ranks: Annotated[
        int | None, typer.Option(help="processes on this machine [default: one for each GPU]", min=1)
    ] = None,
) -> None:
    """Write the features of every image of a data set, with ids, paths and labels.

    If the command is interrupted, the same command continues from there.
    """
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.transfer.embed import Request
    from mimae.transfer.embed import embed as run

    unreadable = run(weights, data, out, Request(what, numbers("--blocks", blocks), dtype, batch), average, ranks)
    if as_json({"out": out, "unreadable": unreadable}):
        return
    say(out)
    for line in unreadable[:10]:
        say(f"left out: {line}")
    if len(unreadable) > 10:
        say(f"left out: {len(unreadable):,} images in total, which could not be read")


Picture = Annotated[Path, typer.Option(metavar="FILE.png", help="the picture to write")]
Limit = Annotated[int, typer.Option(help="maximal number of images to use, evenly spread", min=2)]


def reconstruct(
    run: Annotated[Path, typer.Argument(help="a run, or one of its checkpoints")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="image files, or data sets (some of each)")],
    out: Picture = Path("reconstructions.png"),
    average: Average = False,
) -> None:
    """Draw images, their masked views, and the decoder's reconstructions."""
    from mimae.outside.output import as_json
    from mimae.outside.text import printable, say
    from mimae.transfer.look import reconstruct

    found = reconstruct(run, images, average)
    losses = [{"image": name, "L_rec": loss} for name, loss in zip(found.names, found.losses, strict=True)]
    is_json = as_json({"picture": out, "images": losses})
    if not is_json:
        for name, loss in zip(found.names, found.losses, strict=True):
            say(f"L_rec {loss:.3f}  {printable(name)}")
    write(out, found.png)
    if not is_json:
        say(out)


def neighbours(
    weights: Weights,
    data: Annotated[str, typer.Argument(metavar="PATH", help="images, in any form of data.path")],
    out: Picture = Path("neighbours.png"),
    queries: Annotated[int, typer.Option(help="number of images whose neighbours are shown", min=1, max=64)] = 8,
    nearest: Annotated[int, typer.Option(help="number of neighbours per image", min=1, max=32)] = 8,
    limit: Limit = 5000,
    average: Average = False,
) -> None:
    """Draw images next to the images with the most similar features."""
    from mimae.transfer import look

    write(out, look.neighbours(look.bank(weights, data, limit, average), queries, nearest))
    tell(out)


def features_map(
    weights: Weights,
    data: Annotated[str, typer.Argument(metavar="PATH", help="images, in any form of data.path")],
    out: Picture = Path("map.png"),
    limit: Limit = 2000,
    average: Average = False,
) -> None:
    """Draw images in the plane of the first two principal components of their features."""
    from mimae.transfer import look

    write(out, look.feature_map(look.bank(weights, data, limit, average)))
    tell(out)


def write(out: Path, picture: bytes) -> None:
    """Write a picture. Raises UserError if it cannot be written."""
    from mimae.errors import UserError

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
    except OSError as error:
        raise UserError(f"the picture {out} cannot be written: {error.strerror}") from error


def tell(picture: Path) -> None:
    """Print where a picture is."""
    from mimae.outside.output import as_json
    from mimae.outside.text import say

    if not as_json({"picture": picture}):
        say(picture)


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Return the numbers in a text such as `3,5,7`. Raises UserError if it is malformed."""
    from mimae.errors import UserError

    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{option} {text}: legal are numbers from 0 on, such as 3,5,7,11") from None
    if len(set(found)) < len(found):
        raise UserError(f"{option} {text}: a number occurs twice")
    return found
