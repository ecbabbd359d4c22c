"""The batches of a run: the plan of an epoch, carried out by a loader; batches in order for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from mimae.data.loading.backend import OBSTACLES, DecoderBackend, make_backend
from mimae.data.loading.batch import Batch
from mimae.data.loading.order import BatchRequest, Plan, epoch_order
from mimae.data.loading.samples import EachDecoder, make_batch
from mimae.data.loading.shared_memory import has_room
from mimae.data.loading.workers import Workers, default_workers
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.cache import cached

__all__ = ["OBSTACLES", "Loader", "evaluation_batches", "make_backend", "make_loader"]


class Loader:
    """The micro-batches of one rank, epoch by epoch. Needs (epoch, step) and nothing else to resume."""

    def __init__(self, plan: Plan, backend: DecoderBackend, order: Callable[[int], Tensor]) -> None:
        self.plan = plan
        self._backend = backend
        self._order = lru_cache(maxsize=1)(order)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.plan.steps_per_epoch

    def dropped(self, epoch: int) -> Tensor:
        """The slots that the epoch leaves out, int64: the tail of its order that fills no batch."""
        return self.plan.dropped(self._order(epoch))

    def samples(self, epoch: int, step: int) -> Tensor:
        """The slots of the global batch of a step, int64, over all ranks and micro-batches."""
        batch = self.plan.batch_size
        return self._order(epoch)[step * batch : (step + 1) * batch]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of the epoch from `first_step` on, `accumulate` of them per step."""
        return self._backend.batches(self.plan.requests(self._order(epoch), epoch, first_step))

    def close(self) -> None:
        """Ends what works for the loader."""
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
) -> Loader:
    """The training batches of `source`: `batch_size` images per step, over all ranks and micro-batches.

    `settings.loader` names what makes them; "auto" is "torch" until somebody has measured (`fastest`). Raises DataError
    where the batch does not divide or the source has no full one, and where the loader cannot run.
    """
    shares = source.shares
    plan = Plan(sum(share.draws for share in shares), batch_size, accumulate, rank, world_size)
    order = partial(epoch_order, seed, shares=shares, by_blocks=settings.shuffle == "blocks")
    # The samples and their ids; encoded images, which dali_gpu hands over, take less.
    height, width = settings.size_hw
    batch_bytes = plan.micro_batch * (3 * height * width + 16)
    workers = default_workers() if settings.workers is None else settings.workers
    by_pipe = workers > 0 and not has_room(batch_bytes, workers, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return Loader(plan, make_backend(settings, cached(settings, source), seed, by_pipe=by_pipe), order)


def evaluation_batches(
    settings: DataSettings, source: Source, batch_size: int, ids: Sequence[int] | Tensor | None = None
) -> Iterator[Batch]:
    """Every sample once (or those of `ids`), in order, the last batch smaller: its centre, unmirrored.

    Labels go by `source_ids`: an unreadable image is replaced here too.
    """
    chosen = torch.arange(len(source)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    plain = settings.model_copy(update={"crop_scale": None, "flip": False})
    each = Workers(partial(make_batch, plain, source, 0, decoder=EachDecoder()), plain.workers)
    try:
        yield from each.batches(
            BatchRequest(0, step, part.numpy()) for step, part in enumerate(chosen.split(batch_size))
        )
    finally:
        each.close()
