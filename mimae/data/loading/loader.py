"""Batches of a run: the training loader, which carries out the plan of an epoch, and batches for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from mimae.data.loading.backend import OBSTACLES, DecoderBackend, make_backend
from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.examples import Reader, make_examples
from mimae.data.loading.order import BatchRequest, Plan, SizeAt, epoch_order
from mimae.data.loading.samples import EachDecoder, make_batch
from mimae.data.loading.workers import Workers
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.cache import cached

__all__ = ["OBSTACLES", "Loader", "evaluation_batches", "make_backend", "make_loader"]


class Loader:
    """Micro-batches of one rank, epoch by epoch. To resume it needs only (epoch, step)."""

    def __init__(
        self, plan: Plan, backend: DecoderBackend, order: Callable[[int], Tensor], size_at: SizeAt | None = None
    ) -> None:
        self.plan, self._size_at = plan, size_at
        self._backend = backend
        self._order = lru_cache(maxsize=1)(order)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of an epoch."""
        return self.plan.steps_per_epoch

    def dropped(self, epoch: int) -> Tensor:
        """Return the slots that the epoch drops, int64: the tail of its order that fills no batch."""
        return self.plan.dropped(self._order(epoch))

    def samples(self, epoch: int, step: int) -> Tensor:
        """Return the slots of a step's global batch (all ranks and micro-batches), int64 (batch_size,)."""
        batch = self.plan.batch_size
        return self._order(epoch)[step * batch : (step + 1) * batch]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of the epoch from `first_step` on, `accumulate` per step."""
        return self._backend.batches(self.plan.requests(self._order(epoch), epoch, first_step, self._size_at))

    def close(self) -> None:
        """Stop the loader's worker processes."""
        self._backend.close()


def make_loader(
    settings: DataSettings,
    source: Source,
    *,
    seed: int,
    batch_size: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    reader: Reader | None = None,
    backend: DecoderBackend | None = None,
    size_at: SizeAt | None = None,
) -> Loader:
    """Return the loader of training batches of `source`: `batch_size` images per step over all ranks and micro-batches.

    `settings.loader` selects the decoder backend; "auto" means "torch" here, callers replace it by `backend.choose`. A
    `reader` makes the examples, in the processes of the loader "torch"; without one, images of step s have the size
    `size_at(s)`, at most that of the settings (None: always that of the settings). A `backend` makes the batches in
    place of both. Raises DataError if the batch does not divide evenly, if the source has no full batch, or if the
    backend cannot run.
    """
    shares = source.shares
    plan = Plan(sum(share.draws for share in shares), batch_size, accumulate, rank, world_size)
    order = partial(epoch_order, seed, shares=shares, by_blocks=settings.shuffle == "blocks")
    if backend is not None:
        return Loader(plan, backend, order)
    kept = cached(settings, source)
    if reader is None:
        return Loader(plan, make_backend(settings, kept, seed), order, size_at)
    if settings.loader not in ("auto", "torch"):
        raise DataError(
            f"data.loader={settings.loader} makes images alone, and this task needs targets with them: legal are torch "
            "and auto"
        )
    make = partial(make_examples, settings, kept, seed, reader=reader)
    return Loader(plan, Workers(make, settings.workers), order)


def evaluation_batches(
    settings: DataSettings,
    source: Source,
    batch_size: int,
    ids: Sequence[int] | Tensor | None = None,
    reader: Reader | None = None,
) -> Iterator[Batch]:
    """Yield every sample (or those of `ids`) once, in order: the central crop, not flipped, or what `reader` makes.

    The last batch may be smaller. Use `source_ids` to look up labels: unreadable images are replaced here too.
    """
    chosen = torch.arange(len(source)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    plain = settings.model_copy(update={"crop_scale": None, "flip": False})
    make = (
        partial(make_batch, plain, source, 0, decoder=EachDecoder())
        if reader is None
        else partial(make_examples, plain, source, 0, reader=reader)
    )
    each = Workers(make, plain.workers)
    try:
        yield from each.batches(
            BatchRequest(0, step, part.numpy()) for step, part in enumerate(chosen.split(batch_size))
        )
    finally:
        each.close()
