"""Micro-batches of a task that needs more than a crop: workers make each example, image and targets together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mimae.data.loading.batch import Batch
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.samples import Clock, Slot, batch_of, slots_of
from mimae.data.loading.shared_memory import Empty, unshared
from mimae.data.pixels.decode import BadImage, Encoded
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source


class Example(NamedTuple):
    """An image and what the task learns from it."""

    image: Tensor
    """uint8 (H, W, 3), of the same size for all examples of a batch."""
    targets: dict[str, Tensor]
    """Tensors by name, each of the same shape for all examples of a batch, which stacks them."""


class Reader(Protocol):
    """Makes examples. It is sent to the worker processes, so it holds settings and no open files."""

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        """Return the example of a sample: a pure function of the image and of the numbers, and of the reader's seed.

        `source_id` is the sample whose image this is; `sample_id` is the slot, from which random numbers are drawn.
        They differ where an unreadable sample was replaced. Raises BadImage if the sample cannot be used: another one
        takes its place, and it is listed in bad_samples.jsonl.
        """


def make_examples(
    settings: DataSettings,
    source: Source,
    seed: int,
    request: BatchRequest,
    reader: Reader,
    *,
    empty: Empty = unshared,
) -> Batch:
    """Return the micro-batch of a request; `empty` makes its tensors.

    Raises DataError if a sample cannot be read and no replacement can.
    """
    slots, clock = slots_of(settings, source, seed, request), Clock()
    made = [
        _made(slot, sample_id, request.epoch, reader, clock) for slot, sample_id in zip(slots, request.ids.tolist())
    ]
    targets = {name: _stacked([example.targets[name] for example in made], empty) for name in made[0].targets}
    return batch_of(_stacked([example.image for example in made], empty), slots, request, clock, targets)


def _stacked(parts: Sequence[Tensor], empty: Empty) -> Tensor:
    return torch.stack(parts, out=empty((len(parts), *parts[0].shape), dtype=parts[0].dtype))  # type: ignore[arg-type]


def _made(slot: Slot, sample_id: int, epoch: int, reader: Reader, clock: Clock) -> Example:
    while True:
        encoded = slot.encoded(clock)
        try:
            with clock("decode"):
                return reader(encoded, slot.source_id, sample_id, epoch)
        except BadImage as error:
            slot.refuse(error)
