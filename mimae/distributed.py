"""The process group as the rest of the system sees it: who am I, and the collectives of the objective."""

# DDP reads a hook's annotations as classes, so they are not postponed here.
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# The name from torch 2.14 on, and the one before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup  # type: ignore[name-defined]

T = TypeVar("T")

_seconds = 0.0


def rank() -> int:
    """This process's place among all ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size(group: Group | None = None) -> int:
    """Ranks of the run, or of a group of them."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def setup(patience: float | None = None) -> torch.device:
    """Joins the job of torchrun's environment, or starts a group of one, and returns this rank's device. A collective
    waits `patience` seconds for a rank; None: as long as torch has it."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside nccl: signals are agreed on over the host, without a wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            timeout = None if patience is None else timedelta(seconds=patience)
            dist.init_process_group(backend, timeout=timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    return device


def host_group() -> Group:
    """A new group of all ranks over the host, for a thread whose collectives must not mix with training's."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, Group)
    return group


def gather_objects(mine: T, group: Group | None = None) -> list[T]:
    """What each rank holds, in the order of ranks."""
    if world_size(group) == 1:
        return [mine]
    every: list[Any] = [None] * world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return every


def shutdown() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _timed() -> Iterator[None]:
    global _seconds
    start = time.perf_counter()
    try:
        yield
    finally:
        _seconds += time.perf_counter() - start


def communication_seconds() -> float:
    """Host seconds in collectives since the process started: of gradients (gloo) from the start of a bucket's
    reduction to its end, overlapped with backward; of latents and moments the wait. nccl returns before it is done,
    so there a profile tells."""
    return _seconds


def all_gather(tensor: Tensor, group: Group | None = None) -> Tensor:
    """(b, ...) of each rank -> (W b, ...) in the order of ranks, without gradient; of all ranks, or of a group."""
    ranks = world_size(group)
    if ranks == 1:
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty(ranks * tensor.shape[0], *tensor.shape[1:])
    with _timed():
        _gather(gathered, tensor, group=group)
    return gathered


def all_sum(tensor: Tensor, group: Group | None = None) -> Tensor:
    """The sum over ranks, all or a group's, without gradient, as a new tensor."""
    total = tensor.detach().clone()
    if world_size(group) > 1:
        with _timed():
            dist.all_reduce(total, group=group)
    return total


def timed_all_reduce(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """DDP's own averaging, with its seconds counted."""
    start = time.perf_counter()
    work = dist.all_reduce(bucket.buffer().div_(world_size()), async_op=True)

    def finish(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        global _seconds
        _seconds += time.perf_counter() - start
        return future.value()[0]

    return work.get_future().then(finish)
