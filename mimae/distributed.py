"""The process group of a run: the place of this process in it, and the collectives of the objective."""

from __future__ import annotations

import os
import re
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
from mimae.outside.text import say
from mimae.ranks import messages, place, unpickling

# The first names exist in torch 2.14 and later, the others before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

Group = dist.ProcessGroup  # type: ignore[name-defined]

T = TypeVar("T")

ANNOUNCED = 10.0
"""Seconds after which a wait for other ranks is announced."""

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
"""Variables that make gloo and NCCL listen only on the loopback interface."""


class _Joined:
    """One call of `setup`: its thread, the timeout of its groups, and the actions that `shutdown` undoes."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.undo = ExitStack()
        self.timeout: timedelta | None = None
        """`new_group` does not inherit the default group's timeout."""


_lock = threading.Lock()

_joined: list[_Joined] = []
"""Calls of `setup` that no `shutdown` has ended yet. The first one is the outermost."""


_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Make this thread act as the only rank of a run inside the block, so that it does not wait for other ranks."""
    before = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(before)


def rank() -> int:
    """Return the number of this process among all ranks; the first is 0."""
    return dist.get_rank() if dist.is_initialized() and not _is_alone.get() else 0


def world_size(group: Group | None = None) -> int:
    """Return the number of ranks of the run, or of a group of them."""
    return dist.get_world_size(group) if dist.is_initialized() and not _is_alone.get() else 1


def setup(patience: float | None = None) -> torch.device:
    """Join the other ranks of the job, and return this rank's device.

    An existing process group, made by the caller, is used and kept. Otherwise the environment, set by mimae's launcher,
    torchrun or srun, describes the other ranks. A process that was not started as a rank is the only rank, and listens
    only on the loopback interface. A collective waits at most `patience` seconds for the other ranks; None stands for
    torch's default.

    Raises UserError for an environment or a process group that does not fit, and if another thread of this process is
    in a run. Raises RunError if the other ranks do not join.
    """
    joined = _Joined()
    with _lock:
        if _joined and _joined[0].thread != joined.thread:
            raise UserError("another thread of this process is in a run already: a process can have one run at a time")
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
            # gloo is needed in addition to nccl: ranks agree on signals through the host, without a wait for the GPU.
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
    if os.environ.get("LOCAL_WORLD_SIZE") == str(found.ranks):  # All ranks are on one machine.
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
    timer = threading.Timer(ANNOUNCED, lambda: say(waiting))
    timer.daemon = True
    timer.start()
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch raises many types, for names, ports and times.
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"{waiting}, and failed: {reason}. Start every rank with the same variables, or unset those of another job"
        ) from error
    finally:
        timer.cancel()


def _store(told: str, ranks: int) -> dist.Store:
    """Open the store that mimae's launcher named in the environment. Raises RunError for one that is left over."""
    match = re.fullmatch(r"file:(.+)|tcp:([^:]+):(\d{1,5}):(.+)", told)
    if match is None or (match[1] and not os.path.isdir(os.path.dirname(match[1]))):
        raise RunError(
            f"{place.STORE}={told!r} in the environment is not of a launcher that is running; `unset {place.STORE}`, "
            "which only mimae's launcher sets"
        )
    if match[1]:
        return dist.FileStore(match[1], ranks)  # type: ignore[attr-defined]
    client = dist.TCPStore(match[2], int(match[3]), is_master=False)
    return dist.PrefixStore(match[4], client)


@contextmanager
def _borrowed(device: torch.device, timeout: timedelta | None) -> Iterator[None]:
    """Use the caller's process group: check its backends, and set the timeout of the run.

    The old timeouts are restored afterwards. Raises UserError if a backend is missing.
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
    """Set environment variables inside the block, and restore the old values afterwards."""
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
    """Undo the last `setup`: leave the process group, unless it is the caller's."""
    if _joined:
        _joined.pop().undo.close()


def host_group() -> Group:
    """Return a new gloo group of all ranks, for a thread whose collectives must not mix with those of training."""
    group = dist.new_group(backend="gloo", timeout=_timeout())
    assert isinstance(group, Group)
    return group


def be_patient(group: Group) -> None:
    """Set the timeout of a group that torch made to that of this run's groups."""
    if (timeout := _timeout()) is not None:
        _set_timeout(timeout, group)


def _timeout() -> timedelta | None:
    return _joined[-1].timeout if _joined else None


def gather_objects(mine: T, group: Group | None = None) -> list[T]:
    """Return the value of each rank, in the order of ranks.

    Values are sent as JSON, which cannot run code, unlike a pickle. Raises MessageError for a message of another
    sender.
    """
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
    """Start to gather (b, ...) of each rank, and return a function that waits for the result.

    The result is (W b, ...) in the order of ranks, without gradient. The communication overlaps with the computation
    that is done before the returned function is called.
    """
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
    """Gather (b, ...) of each rank into (W b, ...) in the order of ranks, without gradient."""
    return start_all_gather(tensor)()


def all_sum(tensor: Tensor, group: Group | None = None) -> Tensor:
    """Return the sum over all ranks, or over the ranks of a group, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total
