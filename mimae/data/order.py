"""Which samples make up which micro-batch: a pure function of seed, epoch and step, for any rank count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimae.data.batch import DataError
from mimae.randomness import Purpose, words

GROUP = 16_384
"""Samples that are shuffled together where storage wants its blocks read together."""


class Part(NamedTuple):
    """What the order of an epoch has to know of a source: of its `samples`, `draws` are due each epoch."""

    samples: int
    draws: int
    blocks: np.ndarray
    """int64 (m + 1,): where the runs of samples begin that lie together in storage, and `samples`."""


def epoch_order(seed: int, epoch: int, parts: Sequence[Part], *, by_blocks: bool = False) -> Tensor:
    """The slots of an epoch in their order, int64 (sum of draws,); ids of the parts follow one another.

    Each part is gone through pass after pass, every pass in an order of its own, and an epoch takes up where the last
    one left: within a pass each sample comes exactly once. The draws of a part lie evenly spread over the epoch. A slot
    of the epoch's r-th pass over a part (from 0) is r M + id, M the number of all samples: crops and masks, which go
    by the slot, differ when a sample comes again. One part with as many draws as samples is one pass an epoch.
    """
    first, slots, places = 0, [], []
    total = sum(part.samples for part in parts)
    for part in parts:
        begin, end = epoch * part.draws, (epoch + 1) * part.draws
        start = begin // part.samples
        passes = [
            _pass(seed, number, first, part, by_blocks) + (number - start) * total
            for number in range(start, -(-end // part.samples))
        ]
        skipped = begin - start * part.samples
        slots.append(torch.cat(passes)[skipped : skipped + part.draws])
        places.append((torch.arange(part.draws, dtype=torch.float64) + 0.5) / part.draws)
        first += part.samples
    return torch.cat(slots)[torch.sort(torch.cat(places), stable=True).indices]


def _pass(seed: int, number: int, first: int, part: Part, by_blocks: bool) -> Tensor:
    """Ids first .. first + samples - 1 in the order of a pass, int64: sorted by (64-bit key of words 0 and 1, id);
    method 1.

    By blocks, these are sorted by the like key of words 2 and 3 of their first ids and fill groups of GROUP samples,
    the last block of a group running over; samples are sorted within their group.
    """
    ids = torch.arange(first, first + part.samples)
    order = torch.sort(_keys(seed, number, ids, 0), stable=True).indices
    if by_blocks:
        starts, sizes = torch.from_numpy(part.blocks[:-1]), torch.from_numpy(np.diff(part.blocks))
        blocks = torch.sort(_keys(seed, number, first + starts, 2), stable=True).indices
        group = torch.empty_like(blocks)
        group[blocks] = (sizes[blocks].cumsum(0) - sizes[blocks]) // GROUP
        order = order[torch.sort(group.repeat_interleave(sizes)[order], stable=True).indices]
    return ids[order]


def _keys(seed: int, number: int, ids: Tensor, word: int) -> Tensor:
    """Words `word` and `word` + 1 of the streams of `ids` as one number, int64 and sorting as unsigned."""
    key = words(seed, Purpose.ORDER, number, ids, 2, word)
    # With its top bit turned over, an unsigned number sorts as a signed one.
    return ((key[:, 0] - (1 << 31)) << 32) | key[:, 1]


def spread_ids(samples: int, count: int) -> Tensor:
    """Return `count` ids in [0, samples), or all where there are fewer: int64, ascending, distinct, evenly spread from
    the first to the last. Integers throughout: float32 has none of its own above 2^24, and rounds past the end."""
    count = min(count, samples)
    gaps = max(count - 1, 1)
    return (2 * torch.arange(count) * (samples - 1) + gaps) // (2 * gaps)


class Job(NamedTuple):
    """One micro-batch to be made: the ids of its samples, int64 (B,), and its place in the run.

    The ids travel to a worker in every job, so they are NumPy's: a tensor would go through shared memory.
    """

    epoch: int
    step: int
    ids: np.ndarray


@dataclass(frozen=True)
class Plan:
    """How the order of an epoch's `samples` slots is dealt to steps, micro-batches and ranks.

    Step s covers positions [s G, (s + 1) G) of the epoch's order, G = `batch_size`; its micro-batch a the
    a-th of `accumulate` equal parts of them, and rank r the r-th of `world_size` equal parts of that.
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
        """Optimizer steps of an epoch; the last partial batch is dropped."""
        return self.samples // self.batch_size

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch of one rank."""
        return self.batch_size // (self.accumulate * self.world_size)

    def jobs(self, order: Tensor, epoch: int, first_step: int = 0) -> Iterator[Job]:
        """This rank's micro-batches of the epoch from `first_step` on."""
        share = self.micro_batch
        for step in range(first_step, self.steps_per_epoch):
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * self.world_size + self.rank) * share
                yield Job(epoch, step, order[start : start + share].numpy())

    def dropped(self, order: Tensor) -> Tensor:
        """The ids that the epoch leaves out: the tail of its order."""
        return order[self.steps_per_epoch * self.batch_size :]
