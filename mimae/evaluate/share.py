"""Evaluation spread over ranks: each rank takes a share of the samples, and sums or rows are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mimae.data.loading.batch import Batch
from mimae.data.loading.examples import Reader
from mimae.data.loading.loader import evaluation_batches
from mimae.data.loading.order import spread_ids
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.distributed import all_gather, rank, world_size


class Share(NamedTuple):
    """A rank's share of some samples."""

    ids: Tensor
    """Sample ids, int64, the same number on every rank: a forward may be a collective, which all ranks must call."""
    own: int
    """Number of leading images that count on this rank. The others are padding, and count on another rank."""


def share(ids: Tensor) -> Share:
    """Return this rank's share of `ids` (n,), n at least 1."""
    own = ids[rank() :: world_size()]
    length = -(-len(ids) // world_size())
    return Share(torch.cat([own, ids[: length - len(own)]]), len(own))


def evenly(source: Source, limit: int) -> Tensor:
    """Return the ids of at most `limit` samples, spread evenly over a source."""
    return spread_ids(len(source), limit)


def batches(
    settings: DataSettings, source: Source, ids: Tensor, device: torch.device, size: int, reader: Reader | None = None
) -> Iterator[tuple[Batch, int]]:
    """Yield the batches of this rank's share of `ids` (see `evaluation_batches`), with the number of leading samples
    that count."""
    mine, done = share(ids), 0
    for batch in evaluation_batches(settings, source, min(size, len(mine.ids)), mine.ids, reader):
        yield batch.to(device), max(0, min(len(batch.images), mine.own - done))
        done += len(batch.images)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all ranks in the order of ranks; n may differ between ranks. A collective."""
    counts = all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = all_gather(padded).split(max(counts)) if max(counts) else [rows]
    return torch.cat([part[:count] for part, count in zip(parts, counts)])
