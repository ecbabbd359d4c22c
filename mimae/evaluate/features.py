"""Features of the images of a source, from an encoder or any other function of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae.data.loading.loader import evaluation_batches
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

_PIXEL_SIDE = 32
_BATCH = 256

Extractor = Callable[[Tensor], Tensor]
"""images (B, H, W, 3) uint8 -> features (B, D) float."""


def pixels(images: Tensor) -> Tensor:
    """Return the pixels as features, averaged to 32 x 32 if there are more."""
    planes = images.permute(0, 3, 1, 2).float()
    height, width = (min(side, _PIXEL_SIDE) for side in planes.shape[2:])
    return F.adaptive_avg_pool2d(planes, (height, width)).flatten(1)


@torch.no_grad()
def extract(
    extractors: Mapping[str, Extractor],
    data: DataSettings,
    source: Source,
    ids: Tensor,
    device: torch.device,
    done: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the features (n, D) of each extractor, float32, and their sample ids (n,), all on `device`.

    Each image is decoded once for all extractors. Images that cannot be read have no features. `done` is called with
    the number of images of each batch.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in extractors}
    read = []
    for batch in evaluation_batches(data, source, _BATCH, ids):
        batch = batch.to(device)
        whole = batch.source_ids == batch.sample_ids
        for name, extractor in extractors.items():
            found[name].append(extractor(batch.images)[whole].float())
        read.append(batch.sample_ids[whole])
        done(len(batch.images))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(read)
