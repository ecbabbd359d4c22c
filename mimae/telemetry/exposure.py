"""Exposed communication: the share of a step in which this rank communicates without computing, from a profile.

On CUDA the profile has the kernels of NCCL and all other kernels. On the CPU it has gloo's spans, on gloo's threads,
and the ops of the computing threads, none of which waits for a collective. In both cases a collective lasts from its
start on this rank to its end, which includes the wait for slower ranks.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mimae.distributed import world_size

Span = tuple[int, int]
"""Start and end, in nanoseconds."""

_OPS = ("aten::", "mimae::", "fsdp::", "## Call CompiledFxGraph")
"""Operators that compute on a CPU; none of them waits for a collective."""


class Exposure:
    """Profiler of single steps of runs with more than one rank. It does not change any result."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shares: list[float] = []

    @contextmanager
    def measured(self, wanted: bool) -> Iterator[None]:
        """Profile the step inside the block.

        Every rank profiles the same steps, so that none waits for another's profile.
        """
        if not wanted or world_size() == 1:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler reports its start and stop on stderr.
        on_cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
            self._synchronize()
            began = time.perf_counter_ns()
            yield
            self._synchronize()
            elapsed = time.perf_counter_ns() - began
        # Do not use `profiled.events()`: it builds a tree of calls, which takes longer than the step.
        events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
        self._shares.append(exposed(*_spans(events, on_cuda)) / elapsed)

    def read(self) -> float | None:
        """Return the mean exposed share (0 to 1) of the steps profiled since the last reading, or None if there were
        none."""
        shares, self._shares = self._shares, []
        return statistics.fmean(shares) if shares else None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def exposed(collectives: list[Span], computing: list[Span]) -> int:
    """Return the nanoseconds inside a span of `collectives` and outside all spans of `computing`."""
    return _covered([*collectives, *computing]) - _covered(computing)


def _covered(spans: list[Span]) -> int:
    """Return the length of the union of spans, in nanoseconds."""
    length = reached = 0
    for start, end in sorted(spans):
        length += max(0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _spans(events: Iterable[Any], on_cuda: bool) -> tuple[list[Span], list[Span]]:
    """Return the spans of collectives and those of computation."""
    collectives, computing = [], []
    for event in events:
        name, span = event.name(), (event.start_ns(), event.end_ns())
        if on_cuda and not _is_kernel(event):
            continue
        if name.startswith("nccl" if on_cuda else "gloo:"):
            collectives.append(span)
        elif on_cuda or name.startswith(_OPS):
            computing.append(span)
    return collectives, computing


def _is_kernel(event: Any) -> bool:
    is_on_device = event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    return is_on_device and not event.name().startswith(("Memcpy", "Memset"))
