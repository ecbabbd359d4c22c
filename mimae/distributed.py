"""The process group as the rest of the system sees it: who am I, and the collectives of the objective."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# The names from torch 2.14 on, and those before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

Group = dist.ProcessGroup  # type: ignore[name-defined]

T = TypeVar("T")

_timeout: timedelta | None = None
"""Of the groups of this run; a new one does not take over the first one's by itself."""


_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this thread acts as the only rank of a run: it waits for no other, and counts what one would compute."""
    before = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(before)


def rank() -> int:
    """This process's place among all ranks."""
    return dist.get_rank() if dist.is_initialized() and not _is_alone.get() else 0


def world_size(group: Group | None = None) -> int:
    """Ranks of the run, or of a group of them."""
    return dist.get_world_size(group) if dist.is_initialized() and not _is_alone.get() else 1


def setup(patience: float | None = None) -> torch.device:
    """Joins the job of torchrun's environment, or starts a group of one, and returns this rank's device. A collective
    waits `patience` seconds for a rank; None: as long as torch has it."""
    global _timeout
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside nccl: signals are agreed on over the host, without a wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            _timeout = None if patience is None else timedelta(seconds=patience)
            dist.init_process_group(backend, timeout=_timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    return device


def host_group() -> Group:
    """A new group of all ranks over the host, for a thread whose collectives must not mix with training's."""
    group = dist.new_group(backend="gloo", timeout=_timeout)
    assert isinstance(group, Group)
    return group


def be_patient(group: Group) -> None:
    """Has a group that torch made wait for a rank as long as those of this run do."""
    if _timeout is not None:
        _set_timeout(_timeout, group)


def gather_objects(mine: T, group: Group | None = None) -> list[T]:
    """What each rank holds, in the order of ranks."""
    ranks = world_size() if group is None else group.size()
    if ranks == 1:
        return [mine]
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, group=group)
    return every


def shutdown() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_all_gather(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to gather (b, ...) of each rank and returns at once. The result, when called: (W b, ...) in the order of
    ranks, without gradient; what computes before the call runs beside the gathering."""
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return lambda: tensor
    gathered = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    work = _gather(gathered, tensor, async_op=True)
    assert work is not None

    def wait() -> Tensor:
        work.wait()
        return gathered

    return wait


def all_gather(tensor: Tensor) -> Tensor:
    """(b, ...) of each rank -> (W b, ...) in the order of ranks, without gradient."""
    return start_all_gather(tensor)()


def all_sum(tensor: Tensor, group: Group | None = None) -> Tensor:
    """The sum over ranks, all or a group's, without gradient, as a new tensor."""
    total = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total
