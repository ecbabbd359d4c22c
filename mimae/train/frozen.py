"""Features of a frozen encoder, computed once for the images of a run.

Where no augmentation changes the images, every epoch would compute the same features. The ranks share this work before
the first step. Then each rank holds the features of all images, because every epoch gives it other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from mimae import distributed
from mimae.data.loading.batch import BadSample, Batch
from mimae.data.loading.order import BatchRequest
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.evaluate import share

LIMIT = 16 * 2**30
"""Largest number of bytes of features that a rank holds. With more, the encoder sees every batch."""

_BATCH = 128


def size(images: int, width: int) -> int:
    """Return the bytes of the features of so many images."""
    return 4 * images * width


class Features:
    """A decoder backend whose batches have features (B, D) in place of images."""

    def __init__(self, source: Source, width: int) -> None:
        self.source, self.rows = source, torch.empty(0, width)
        self.shown = torch.arange(len(source))
        """Sample whose features a row has: another one if an image cannot be read."""
        self.bad: dict[int, list[BadSample]] = {}
        """Images that could not be read, by the row that they were meant for."""

    def compute(self, settings: DataSettings, features: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Compute the features of all images of the source. This is a collective.

        `features` maps images (B, H, W, 3) to (B, D).
        """
        count, width = len(self.source), self.rows.shape[1]
        self.rows = torch.empty(count, width)
        bad = list[BadSample]()
        for batch, _ in share.batches(settings, self.source, torch.arange(count), device, _BATCH):
            found = features(batch.images).float()
            ids, shown, rows = (distributed.all_gather(t).cpu() for t in (batch.sample_ids, batch.source_ids, found))
            self.rows[ids], self.shown[ids] = rows, shown
            bad += batch.bad
        every = {BadSample(*one) for each in distributed.gather_objects(bad) for one in each}
        replaced = (self.shown != torch.arange(count)).nonzero().flatten().tolist()
        self.bad = {row: [one for one in every if one.id == row] for row in replaced}

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batches of `requests` in order."""
        for request in requests:
            ids = torch.from_numpy(request.ids)
            rows = ids % len(self.rows)
            bad = [one for row in rows.tolist() for one in self.bad.get(row, ())]
            yield Batch(self.rows[rows], ids, self.shown[rows], request.epoch, request.step, bad)

    def close(self) -> None:
        """Do nothing: there are no worker processes."""
