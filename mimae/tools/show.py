"""`mimae data show`: what a recipe makes of a data set, to look at before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from mimae.config import recipe as config
from mimae.config.recipe import Recipe
from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.loader import evaluation_batches, make_loader
from mimae.data.sources.base import open_source
from mimae.model.geometry import Grid
from mimae.model.masking import views
from mimae.telemetry import pictures


def show(recipe: Recipe, images: int, epoch: int = 0) -> tuple[bytes, Batch]:
    """A PNG with a row for each of the first `images` samples of an epoch, and their batch: the centre of the image,
    the sample that is cut from it, each of its views. Raises DataError."""
    source = open_source(recipe.data.path)
    data = recipe.data.model_copy(update={"workers": 0})
    count = min(images, sum(part.draws for part in source.parts))
    batch = next(make_loader(data, source, seed=recipe.seed, batch_size=count).epoch(epoch))
    (centres,) = evaluation_batches(data, source, count, batch.source_ids)
    visible, _ = views(recipe, recipe.seed, epoch, batch.sample_ids)
    shown = masked(batch.images, visible, recipe.model.patch_size)
    labels = ["centre", "sample", *(f"view {view + 1}" for view in range(shown.shape[1]))]
    panels = [centres.images, batch.images, *shown.unbind(1)]
    return pictures.sheet(labels, panels, wide=(1, 2)), batch


def masked(images: Tensor, visible: Tensor, patch: int) -> Tensor:
    """images uint8 (B, H, W, 3), visible (B, N, K) -> (B, N, H, W, 3): each view's patches, grey for the others."""
    grid = Grid.of(images.shape[1:3], patch)
    seen = torch.zeros(len(images), visible.shape[1], grid.patches, dtype=torch.bool)
    seen = seen.scatter_(2, visible.long(), True).unflatten(2, (grid.rows, grid.columns))
    seen = seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(seen[..., None], images[:, None], torch.tensor(pictures.HIDDEN, dtype=torch.uint8))


def main(
    path: Annotated[str, typer.Argument(help="a data path, as data.path")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="the picture")] = Path("samples.png"),
    recipe: Annotated[str | None, typer.Option(help="path or name of a recipe [default: default settings]")] = None,
    images: Annotated[int, typer.Option(help="samples to show", min=1, max=256)] = 8,
    epoch: Annotated[int, typer.Option(help="whose crops, flips and masks", min=0)] = 0,
) -> None:
    """Draw samples as a recipe cuts them, with their masks."""
    resolved = config.load(recipe or {}, overrides or (), {"data": {"path": path}}).recipe
    picture, batch = show(resolved, images, epoch)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
    except OSError as error:
        raise DataError(f"cannot write the picture {out}: {error.strerror}") from error
    print(out)
    for bad in batch.bad:
        print(f"replaced: {bad.path}: {bad.reason}")
