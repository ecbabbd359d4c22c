"""The share of a step in which ranks communicate and nothing computes, from a profile of that step.

On CUDA the profile has the kernels of NCCL and all others. On the CPU it has gloo's spans, on gloo's threads, and the
ops of the threads that compute; these wait for a collective in no op. Either way a collective lasts from its start on
this rank to its end, with the wait for slower ranks.
"""

from __future__ import annotations

import os
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
    """Profiles a step where there is more than one rank. No result depends on it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._share: float | None = None

    @contextmanager
    def measured(self, wanted: bool) -> Iterator[None]:
        """Around a step; every rank asks for the same ones, so that none waits for a profile of another."""
        if not wanted or world_size() == 1:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and stop on stderr
        on_cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
            self._synchronize()
            began = time.perf_counter_ns()
            yield
            self._synchronize()
            elapsed = time.perf_counter_ns() - began
        # Not `profiled.events()`: to build the tree of calls takes longer than the step.
        self._share = exposed(*_spans(profiled.profiler.kineto_results.events(), on_cuda)) / elapsed  # type: ignore[union-attr]

    def read(self) -> float | None:
        """The exposed share of the step profiled since the last reading, 0 to 1; None where there was none."""
        share, self._share = self._share, None
        return share

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def exposed(collectives: list[Span], computing: list[Span]) -> int:
    """Nanoseconds that lie in some span of `collectives` and in none of `computing`."""
    return _covered([*collectives, *computing]) - _covered(computing)


def _covered(spans: list[Span]) -> int:
    """The length of the union."""
    length = reached = 0
    for start, end in sorted(spans):
        length += max(0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _spans(events: Iterable[Any], on_cuda: bool) -> tuple[list[Span], list[Span]]:
    """Collectives, and what computes."""
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
