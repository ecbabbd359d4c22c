"""Seconds and bytes of a training step. This module imports only torch, so that it can measure other versions too."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def clock() -> tuple[str, Callable[[], float]]:
    """Return the name of the clock, and the clock.

    One thread is measured in the seconds of its processor, which do not include waits for other programs. Several
    threads and GPUs are measured in real time.
    """
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return ("processor", time.process_time) if is_alone else ("wall", time.perf_counter)


def timed(step: Callable[[], object], steps: int) -> float:
    """Return the seconds of a step, as a mean over `steps` steps."""
    _, now = clock()
    _wait()
    start = now()
    for _ in range(steps):
        step()
    _wait()
    return (now() - start) / steps


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that exist, and their peak, while the operators of torch run in this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        for each in tree_leaves(results):
            if isinstance(each, Tensor) and (storage := each.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return results

    def _free(self, size: int) -> None:
        self.now -= size


def allocated(make: Callable[[], Any]) -> dict[str, int]:
    """Return bytes of the second step of the contender that `make` builds, without computing it.

    `kept_bytes` are those that forward leaves for backward; `peak_bytes` are those of all tensors, weights, gradients
    and moments included. The scratch memory of kernels is not counted. Blocks run operator by operator.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as bytes_of:
        contender = make()
        contender.step()  # The second step has the optimizer's moments.
        masks, before = contender.draw(), bytes_of.now
        bytes_of.peak = before
        loss = contender.forward(masks, contender.recipe.precision)
        kept = bytes_of.now - before
        loss.backward()
        contender.update()
        return {"kept_bytes": kept, "peak_bytes": bytes_of.peak}
