"""Runs a function in several gloo processes on this machine, and hands back what each returned."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mimae import distributed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    distributed.setup()
    torch.save(function(*args), folder / f"{rank}.pt")
    distributed.shutdown()


def run_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on each of `world_size` ranks; the results by rank (tensors, numbers, dicts of them)."""
    mp.spawn(  # type: ignore[attr-defined]
        _enter, (world_size, _free_port(), folder, function, args), nprocs=world_size
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
