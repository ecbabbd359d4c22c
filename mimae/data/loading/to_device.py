"""The way of the batches to the device: each is copied while the device still works on the one before it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mimae.data.loading.batch import Batch


class Lane(Protocol):
    """A queue of the device's work for copies, beside the one that computes."""

    def after_computing(self) -> None:
        """Copies given from now on begin when the computing given so far is done."""

    def before_computing(self) -> None:
        """Computing given from now on begins when the copies given so far are done."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Gives a copy to the queue; returns at once where `source` lies in pinned memory."""


class Transfer:
    """Brings batches to `device`; those made on the host are there one ahead of the one in use.

    They go to two buffers on the device in turn: a batch is for the work that is given to the device before the next
    one is asked for. Batches that are made on the device, and all where it is the CPU, are handed through.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self._device = device
        self._lane = _CudaLane(device) if lane is None and device.type == "cuda" else lane
        # Kept for good: an allocator takes memory back that two streams used only when both are done with it, and a
        # host that runs ahead would take more and more.
        self._buffers: list[tuple[Tensor, ...]] = [(), ()]
        self.waited = 0.0
        """Seconds by the host's clock in which a batch was asked for and not there, since this was made."""

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on the device, in their order. An error is raised when the batch that it belongs to is due."""
        source = iter(batches)
        batch = self._next(source)
        if self._lane is not None and batch is not None and batch.images.device.type == "cpu":
            yield from self._copied(self._lane, batch, source)
            return
        while batch is not None:
            yield batch.to(self._device)
            # Not ahead: its memory may be the loader's, for the next batch.
            batch = self._next(source)

    def _copied(self, lane: Lane, first: Batch, source: Iterator[Batch]) -> Iterator[Batch]:
        """`first` and the batches of `source`, each handed out when the copy of the one behind it is under way."""
        coming: Batch | Exception | None = self._begin(lane, first)
        while coming is not None:
            if isinstance(coming, Exception):
                raise coming
            # Before the next copy is given: this batch has not to wait for that one.
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
        """Gives the copy of a batch to the lane, into the buffers of the last but one."""
        tensors = (made.images, made.sample_ids, made.source_ids)
        self._buffers.reverse()
        if [buffer.shape for buffer in self._buffers[0]] != [tensor.shape for tensor in tensors]:
            self._buffers[0] = tuple(torch.empty_like(tensor, device=self._device) for tensor in tensors)
        lane.after_computing()
        for target, tensor in zip(self._buffers[0], tensors):
            lane.copy(target, tensor)
        images, sample_ids, source_ids = self._buffers[0]
        return replace(made, images=images, sample_ids=sample_ids, source_ids=source_ids)


class _CudaLane:
    """A stream of the device beside the current one."""

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
