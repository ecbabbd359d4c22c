"""Which samples make up which micro-batch: a pure function of seed, epoch and step, for any rank count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimae.data.batch import DataError
from mimae.randomness import Purpose, words


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The permutation of an epoch, int64 (n,): ids sorted by (64-bit key of words 0 and 1, id); method 1."""
    key = words(seed, Purpose.ORDER, epoch, torch.arange(n), 2)
    # Keys are unsigned: with its top bit turned over, a key sorts as a signed integer.
    signed = ((key[:, 0] - (1 << 31)) << 32) | key[:, 1]
    return torch.sort(signed, stable=True).indices


class Job(NamedTuple):
    """One micro-batch to be made: the ids of its samples, int64 (B,), and its place in the run.

    The ids travel to a worker in every job, so they are NumPy's: a tensor would go through shared memory.
    """

    epoch: int
    step: int
    ids: np.ndarray


@dataclass(frozen=True)
class Plan:
    """How the order of `samples` ids is dealt to steps, micro-batches and ranks.

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

    def jobs(self, order: Tensor, epoch: int, first_step: int = 0) -> Iterator[Job]:
        """This rank's micro-batches of the epoch from `first_step` on."""
        share = self.batch_size // (self.accumulate * self.world_size)
        for step in range(first_step, self.steps_per_epoch):
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * self.world_size + self.rank) * share
                yield Job(epoch, step, order[start : start + share].numpy())

    def dropped(self, order: Tensor) -> Tensor:
        """The ids that the epoch leaves out: the tail of its order."""
        return order[self.steps_per_epoch * self.batch_size :]
