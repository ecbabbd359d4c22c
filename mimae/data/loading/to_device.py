"""Copy of batches to the device: each batch is copied while the device still works on the previous one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from mimae.data.loading.batch import Batch


class Lane(Protocol):
    """A device queue for copies, separate from the queue that computes."""

    def after_computing(self) -> None:
        """Make copies that are queued from now on wait for all computation queued so far."""

    def before_computing(self) -> None:
        """Make computation that is queued from now on wait for all copies queued so far."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy. Returns at once if `source` is in pinned memory."""


class Transfer:
    """Moves batches to `device`. Batches from the host are copied one batch ahead of the one in use.

    They are copied to two device buffers in turn, so a batch is valid only for work that is queued before the next
    batch is requested. Batches that are made on the device, and all batches if it is the CPU, are passed through.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self._device = device
        self._lane = _CudaLane(device) if lane is None and device.type == "cuda" else lane
        # Allocated once: the caching allocator reuses memory that two streams used only when both are done with it, so
        # a host that runs ahead would allocate more and more.
        self._buffers: list[dict[str, Tensor]] = [{}, {}]
        self.waited = 0.0
        """Total seconds, by the host's clock, that the host waited for the loader's next batch."""

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches on the device, in order. An error is raised in place of the batch that it belongs to."""
        source = iter(batches)
        batch = self._next(source)
        if self._lane is not None and batch is not None and batch.images.device.type == "cpu":
            yield from self._copied(self._lane, batch, source)
            return
        while batch is not None:
            yield batch.to(self._device)
            # Not prefetched: the loader may own the batch's memory and reuse it for the next batch.
            batch = self._next(source)

    def _copied(self, lane: Lane, first: Batch, source: Iterator[Batch]) -> Iterator[Batch]:
        """Yield `first` and the batches of `source`, each after the copy of the next one has been queued."""
        coming: Batch | Exception | None = self._begin(lane, first)
        while coming is not None:
            if isinstance(coming, Exception):
                raise coming
            # This comes before the next copy is queued: this batch must not wait for that copy.
            lane.before_computing()
            batch = coming
            try:
                made = self._next(source)
                coming = None if made is None else self._begin(lane, made)
            except Exception as error:
                coming = error
            yield batch

    def _next(self, source: Iterator[Batch]) -> Batch | None:
        began = time.perf_counter()
        try:
            return next(source, None)
        finally:
            self.waited += time.perf_counter() - began

    def _begin(self, lane: Lane, made: Batch) -> Batch:
        """Queue the copy of a batch into the buffers of the batch before the previous one."""
        tensors = made.tensors()
        self._buffers.reverse()
        if not _alike(self._buffers[0], tensors):
            self._buffers[0] = {name: torch.empty_like(t, device=self._device) for name, t in tensors.items()}
        lane.after_computing()
        for name, target in self._buffers[0].items():
            lane.copy(target, tensors[name])
        return made.with_tensors(self._buffers[0])


def _alike(buffers: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there is a buffer of the right shape for each tensor."""
    return {name: t.shape for name, t in buffers.items()} == {name: t.shape for name, t in tensors.items()}


class _CudaLane:
    """A CUDA stream for copies, separate from the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def after_computing(self) -> None:
        self._copies.wait_stream(torch.cuda.current_stream(self._device))

    def before_computing(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
