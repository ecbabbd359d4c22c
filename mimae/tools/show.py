"""`mimae data show`: a picture of the samples that a recipe cuts from a data set."""

from __future__ import annotations

import torch
from torch import Tensor

from mimae.config.recipe import Recipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import evaluation_batches, make_loader
from mimae.data.sources.open import open_source
from mimae.model.geometry import Grid
from mimae.model.masking import views
from mimae.telemetry import pictures


def show(recipe: Recipe, images: int, epoch: int = 0) -> tuple[bytes, Batch]:
    """Return a PNG with a row for each of the first `images` samples of an epoch, and their batch.

    A row has the centre of the image, the sample that is cut from it, and each of its views. Raises DataError.
    """
    source = open_source(recipe.data.path, settings=recipe.data)
    data = recipe.data.model_copy(update={"workers": 0})
    count = min(images, sum(share.draws for share in source.shares))
    batch = next(make_loader(data, source, seed=recipe.seed, batch_size=count).epoch(epoch))
    (centres,) = evaluation_batches(data, source, count, batch.source_ids)
    visible, _ = views(recipe, recipe.seed, epoch, batch.sample_ids)
    shown = masked(batch.images, visible, recipe.model.patch_size)
    labels = ["centre", "sample", *(f"view {view + 1}" for view in range(shown.shape[1]))]
    panels = [centres.images, batch.images, *shown.unbind(1)]
    return pictures.sheet(labels, panels, wide=(1, 2)), batch


def masked(images: Tensor, visible: Tensor, patch: int) -> Tensor:
    """Return the views (B, N, H, W, 3) of images uint8 (B, H, W, 3) with visible (B, N, K); hidden patches are grey."""
    grid = Grid.of(images.shape[1:3], patch)
    seen = torch.zeros(len(images), visible.shape[1], grid.patches, dtype=torch.bool)
    seen = seen.scatter_(2, visible.long(), True).unflatten(2, (grid.rows, grid.columns))
    seen = seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(seen[..., None], images[:, None], torch.tensor(pictures.HIDDEN, dtype=torch.uint8))
