"""The process group as the rest of the system sees it: who am I, and the collectives of the objective."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mimae.errors import RunError, UserError
from mimae.ranks import messages, place, unpickling

# The names from torch 2.14 on, and those before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

Group = dist.ProcessGroup  # type: ignore[name-defined]

T = TypeVar("T")

ANNOUNCED = 10.0
"""Seconds of waiting for other ranks after which the waiting is announced."""

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
"""Has gloo and NCCL listen on the loopback alone."""


class _Joined:
    """One call of `setup`: the thread that made it, the timeout of its groups, and what `shutdown` undoes."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.undo = ExitStack()
        self.timeout: timedelta | None = None
        """`new_group` does not inherit the default group's timeout."""


_lock = threading.Lock()

_joined: list[_Joined] = []
"""The calls of `setup` that no `shutdown` has ended yet; the first one is the outermost."""


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
    """Return this process's place among all ranks."""
    return dist.get_rank() if dist.is_initialized() and not _is_alone.get() else 0


def world_size(group: Group | None = None) -> int:
    """Return the number of ranks of the run, or of a group of them."""
    return dist.get_world_size(group) if dist.is_initialized() and not _is_alone.get() else 1


def setup(patience: float | None = None) -> torch.device:
    """Join the other ranks of the job, and return this rank's device.

    A process group that is there already is used and kept: the caller's. Else mimae's launcher, torchrun or srun tell
    in the environment who the others are; a process that nothing started as a rank is alone, with nothing that
    listens beyond the loopback. A collective waits `patience` seconds for a rank; None: as long as torch has it.

    Raises UserError for an environment or a process group that does not fit, and where another thread of this process
    is in a run; RunError where the other ranks do not come.
    """
    joined = _Joined()
    with _lock:
        if _joined and _joined[0].thread != joined.thread:
            raise UserError("another thread of this process is in a run already: a process holds one run at a time")
        _joined.append(joined)
    try:
        joined.undo.enter_context(unpickling.restricted())
        joined.timeout = None if patience is None else timedelta(seconds=patience)
        if dist.is_initialized():
            device = _device()
            joined.undo.enter_context(_borrowed(device, joined.timeout))
        else:
            found = place.find()
            device = _device()
            # gloo beside nccl: signals are agreed on over the host, without a wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            if found is None or found.ranks == 1:
                joined.undo.enter_context(_variables(_LOOPBACK))
                alone = dist.HashStore()  # type: ignore[attr-defined]
                dist.init_process_group(backend, store=alone, rank=0, world_size=1)
            else:
                _join(backend, found, joined.timeout)
            joined.undo.callback(_leave)
    except BaseException:
        shutdown()
        raise
    return device


def _device() -> torch.device:
    """Return this rank's device, and make it torch's current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = place.number(os.environ, "LOCAL_RANK", torch.cuda.current_device())
    if index >= (count := torch.cuda.device_count()):
        raise UserError(
            f"LOCAL_RANK={index}, and this process sees {count} GPU{'s' * (count > 1)} (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}): every rank has to see the GPUs of all ranks of its "
            "machine, one for each"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _join(backend: str, found: place.Place, timeout: timedelta | None) -> None:
    """Make the process group of a job of several ranks."""
    if os.environ.get("LOCAL_WORLD_SIZE") == str(found.ranks):  # all on one machine
        for name, value in _LOOPBACK.items():
            os.environ.setdefault(name, value)
    if ours := os.environ.get(place.STORE):
        store = _store(ours, found.ranks)
        if timeout is not None:
            store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=found.rank, world_size=found.ranks, timeout=timeout)
        return
    waiting = (
        f"rank {found.rank} waits for all {found.ranks} ranks (RANK, WORLD_SIZE) at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    )
    timer = threading.Timer(ANNOUNCED, lambda: print(waiting, flush=True))
    timer.daemon = True
    timer.start()
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch has many, for names, ports and times
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"{waiting}, in vain: {reason}. Start every rank with the same variables, or unset those of another job"
        ) from error
    finally:
        timer.cancel()


def _store(told: str, ranks: int) -> dist.Store:
    """Open the store that mimae's launcher names."""
    kind, _, rest = told.partition(":")
    if kind == "file":
        return dist.FileStore(rest, ranks)  # type: ignore[attr-defined]
    host, port, prefix = rest.split(":", 2)
    client = dist.TCPStore(host, int(port), is_master=False)
    return dist.PrefixStore(prefix, client)


@contextmanager
def _borrowed(device: torch.device, timeout: timedelta | None) -> Iterator[None]:
    """Use the caller's process group: look at its backends, and have it wait as long as the run's own groups would.

    Raises UserError.
    """
    group = dist.distributed_c10d._get_default_group()
    backends = []
    for kind in dict.fromkeys(("cpu", device.type)):
        try:
            backends.append(group._get_backend(torch.device(kind)))
        except RuntimeError as error:
            wanted = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            raise UserError(
                f"this process has a process group ({dist.get_backend_config()}) that cannot exchange tensors of the "
                f"{kind}: make it with init_process_group({wanted!r}), or destroy it before the run"
            ) from error
    options = [(backend, getattr(backend, "options", None)) for backend in backends]
    waits = [(backend, each._timeout) for backend, each in options if each is not None]
    for backend, before in waits:
        if timeout is not None:
            backend._set_default_timeout(max(timeout, before))
    try:
        yield
    finally:
        for backend, before in waits:
            backend._set_default_timeout(before)


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shutdown() -> None:
    """End what the last `setup` began: leave the process group, if it is not the caller's."""
    if _joined:
        _joined.pop().undo.close()


def host_group() -> Group:
    """Return a new group of all ranks over the host, for a thread whose collectives must not mix with training's."""
    group = dist.new_group(backend="gloo", timeout=_timeout())
    assert isinstance(group, Group)
    return group


def be_patient(group: Group) -> None:
    """Have a group that torch made wait for a rank as long as the groups of this run do."""
    if (timeout := _timeout()) is not None:
        _set_timeout(timeout, group)


def _timeout() -> timedelta | None:
    return _joined[-1].timeout if _joined else None


def gather_objects(mine: T, group: Group | None = None) -> list[T]:
    """Return the value of each rank, in the order of ranks. Values are JSON's: what a peer sends runs no code, as a
    pickle could. Raises MessageError for a message of somebody else."""
    message, ranks = messages.pack(mine, f"rank {rank()}").encode(), world_size(group)
    if ranks == 1:
        return [messages.unpack(message, f"rank {rank()}")]
    sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    sizes = torch.empty(ranks, dtype=torch.int64)
    _gather(sizes, torch.tensor([len(sent)]), group=group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(sent)] = sent
    received = torch.empty(ranks * len(padded), dtype=torch.uint8)
    _gather(received, padded, group=group)
    senders = dist.get_process_group_ranks(group)
    return [
        messages.unpack(row[:size].numpy().tobytes(), f"rank {sender}")
        for row, size, sender in zip(received.view(ranks, -1), sizes.tolist(), senders)
    ]


def start_all_gather(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to gather (b, ...) of each rank and return at once. The result, when called: (W b, ...) in the order of
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
