"""Run functions in processes on this machine: one, or several that are gloo ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mimae import distributed

# The server has no threads, so that a fork of it finds no lock taken, and its imports take no time in a fork.
multiprocessing.set_forkserver_preload(["tests.rank_imports"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_process(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Return a process, not yet started, that runs `function(*args)` with the environment of this process."""
    return multiprocessing.get_context("forkserver").Process(target=_enter, args=(dict(os.environ), function, args))


def _enter(environment: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # The server's environment is older than this test.
    os.environ |= environment
    function(*args)


def _rank(rank: int, environment: dict[str, str], folder: Path, function: Callable[..., Any], args: Any) -> None:
    _enter(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, _result, (folder / f"{rank}.pt", function, args))


def _result(file: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.setup()
    torch.save(function(*args), file)
    distributed.shutdown()


def run_ranks(
    world_size: int, folder: Path, function: Callable[..., Any], *args: Any, fresh: bool = False
) -> list[Any]:
    """Run `function(*args)` on each of `world_size` ranks.

    Returns the results (tensors, numbers, dicts of them) in the order of the ranks. With `fresh` each rank is a new
    interpreter, whose C library reads the environment as it starts.
    """
    address = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    mp.start_processes(  # type: ignore[attr-defined]
        _rank,
        (dict(os.environ) | address, folder, function, args),
        nprocs=world_size,
        start_method="spawn" if fresh else "forkserver",
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
