"""Assignment of samples to micro-batches: a pure function of seed, epoch and step, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimae.data.loading.batch import DataError
from mimae.randomness import Purpose, words

SizeAt = Callable[[int], tuple[int, int]]
"""Function from an optimizer step of the run, counted from 0, to the height and width of its images."""

GROUP = 16_384
"""Size of the shuffle window, in samples, for `data.shuffle=blocks`."""


class Share(NamedTuple):
    """A source's share of an epoch: it has `samples` samples, and `draws` samples are drawn from it per epoch."""

    samples: int
    draws: int
    blocks: np.ndarray
    """int64 (m + 1,): first id of each block (run of samples stored together), followed by `samples`."""


def epoch_order(seed: int, epoch: int, shares: Sequence[Share], *, by_blocks: bool = False) -> Tensor:
    """Return the slots of an epoch in order, int64 (sum of draws,). The shares' ids are consecutive.

    Each share is read in passes. A pass contains each of its samples exactly once, in a new random order. An epoch
    continues where the previous one stopped. The draws of a share are spread evenly over the epoch.

    In the epoch's r-th pass over a share (r counts from 0) the slot of a sample is r M + id, where M is the number of
    all samples. Crops and masks depend on the slot, so they differ when a sample is repeated within an epoch. A single
    share with as many draws as samples gives one pass per epoch.
    """
    first, slots, places = 0, [], []
    total = sum(share.samples for share in shares)
    for share in shares:
        begin, end = epoch * share.draws, (epoch + 1) * share.draws
        start = begin // share.samples
        passes = [
            _pass(seed, number, first, share, by_blocks) + (number - start) * total
            for number in range(start, -(-end // share.samples))
        ]
        skipped = begin - start * share.samples
        slots.append(torch.cat(passes)[skipped : skipped + share.draws])
        places.append((torch.arange(share.draws, dtype=torch.float64) + 0.5) / share.draws)
        first += share.samples
    return torch.cat(slots)[torch.sort(torch.cat(places), stable=True).indices]


def _pass(seed: int, number: int, first: int, share: Share, by_blocks: bool) -> Tensor:
    """Return the ids first .. first + samples - 1 in the order of a pass, int64 (samples,).

    This is method 1: the ids are sorted by (64-bit key of words 0 and 1, id). With `by_blocks`, the blocks are first
    sorted by the key of words 2 and 3 of their first ids. They fill groups of GROUP samples; the last block of a group
    may exceed it. Then the samples are sorted within their group.
    """
    ids = torch.arange(first, first + share.samples)
    order = torch.sort(_keys(seed, number, ids, 0), stable=True).indices
    if by_blocks:
        starts, sizes = torch.from_numpy(share.blocks[:-1]), torch.from_numpy(np.diff(share.blocks))
        blocks = torch.sort(_keys(seed, number, first + starts, 2), stable=True).indices
        group = torch.empty_like(blocks)
        group[blocks] = (sizes[blocks].cumsum(0) - sizes[blocks]) // GROUP
        order = order[torch.sort(group.repeat_interleave(sizes)[order], stable=True).indices]
    return ids[order]


def _keys(seed: int, number: int, ids: Tensor, word: int) -> Tensor:
    """Return words `word` and `word` + 1 of the random streams of `ids` as int64 that sorts like the unsigned key."""
    key = words(seed, Purpose.ORDER, number, ids, 2, word)
    # With the top bit inverted, signed order equals the unsigned order.
    return ((key[:, 0] - (1 << 31)) << 32) | key[:, 1]


class BatchRequest(NamedTuple):
    """Request for one micro-batch: the ids of its samples, int64 (B,), and its epoch and step.

    The ids are a NumPy array because each request is sent to a worker: a tensor would use shared memory.
    """

    epoch: int
    step: int
    ids: np.ndarray
    size_hw: tuple[int, int] | None = None
    """Height and width of its images; None: those of the settings. The windows that are cut are the same."""


@dataclass(frozen=True)
class Plan:
    """Distribution of an epoch's `samples` slots over steps, micro-batches and ranks.

    Step s covers positions [s G, (s + 1) G) of the epoch's order, where G = `batch_size`. Its micro-batch a is the
    a-th of `accumulate` equal parts of these positions, and rank r gets the r-th of `world_size` equal parts of that.
    """

    samples: int
    batch_size: int
    accumulate: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulate * self.world_size):
            raise DataError(
                f"schedule.batch_size = {self.batch_size} does not divide into {self.world_size} ranks x "
                f"{self.accumulate} micro-batches; make it a multiple of {self.accumulate * self.world_size}"
            )
        if self.samples < self.batch_size:
            raise DataError(
                f"an epoch of {self.samples} samples has no full batch of {self.batch_size} images; "
                f"lower schedule.batch_size to at most {self.samples}, or give more images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of an epoch; the last partial batch is dropped."""
        return self.samples // self.batch_size

    @property
    def micro_batch(self) -> int:
        """Number of samples in a micro-batch of one rank."""
        return self.batch_size // (self.accumulate * self.world_size)

    def requests(
        self, order: Tensor, epoch: int, first_step: int = 0, size_at: SizeAt | None = None
    ) -> Iterator[BatchRequest]:
        """Yield the requests for this rank's micro-batches of the epoch from `first_step` on."""
        size = self.micro_batch
        for step in range(first_step, self.steps_per_epoch):
            size_hw = None if size_at is None else size_at(epoch * self.steps_per_epoch + step)
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * self.world_size + self.rank) * size
                yield BatchRequest(epoch, step, order[start : start + size].numpy(), size_hw)

    def dropped(self, order: Tensor) -> Tensor:
        """Return the slots that the epoch drops: the tail of its order that fills no batch."""
        return order[self.steps_per_epoch * self.batch_size :]


def spread_ids(samples: int, count: int) -> Tensor:
    """Return `count` ids in [0, samples), or all of them where there are fewer: int64, ascending, distinct and evenly
    spread from the first to the last.

    The arithmetic is in integers: float32 cannot represent every integer above 2^24, and would round past the end.
    """
    count = min(count, samples)
    gaps = max(count - 1, 1)
    return (2 * torch.arange(count) * (samples - 1) + gaps) // (2 * gaps)
