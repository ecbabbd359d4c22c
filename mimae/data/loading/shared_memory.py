"""Transfer of results from worker processes: through shared memory, or through a pipe if shared memory is full.

torch moves a tensor to shared memory in a thread of the worker. If that fails, the result is lost and its reader waits
forever. Here the worker's main thread moves it, and can fall back to a pipe.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimae.outside.text import say

FOLDER = "/dev/shm"
"""Folder of the shared memory; a Docker container has 64 MB of it by default."""

IN_FLIGHT = 3
"""Largest number of a worker's results in shared memory: two that are finished and the one in progress."""


class Packed(NamedTuple):
    """A result that is sent through a pipe."""

    data: bytes

    def unpacked(self) -> Any:
        """Return the result, in pinned memory if torch would have pinned it."""
        say_once()
        made = pickle.loads(self.data)
        return made.pin_memory() if torch.cuda.is_available() and hasattr(made, "pin_memory") else made


def handed_over(made: Any, by_pipe: bool) -> Any:
    """Return a worker's result with its tensors in shared memory, or packed for a pipe."""
    if not by_pipe:
        try:
            for tensor in _tensors(made):
                tensor.share_memory_()
            return made
        except (RuntimeError, OSError):  # Shared memory is full. The tensors are unchanged.
            pass
    return Packed(pickle.dumps(made, pickle.HIGHEST_PROTOCOL))


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, dict):
        for value in made.values():
            yield from _tensors(value)
    elif is_dataclass(made):
        for field in fields(made):
            yield from _tensors(getattr(made, field.name))


def has_room(batch_bytes: int, workers: int, ranks: int) -> bool:
    """Return whether shared memory can hold the batches in flight of this machine's ranks; if not, print so once."""
    need = batch_bytes * workers * IN_FLIGHT * ranks
    room = free()
    if room is None or need <= room:
        return True
    say_once(
        f"the batches in flight need {need / 1e6:,.1f} MB ({ranks * workers} workers x {IN_FLIGHT} x "
        f"{batch_bytes / 1e6:,.1f} MB), and {FOLDER} has {room / 1e6:,.1f} MB free: "
    )
    return False


def free() -> int | None:
    """Return the free bytes of shared memory; None if they are not known."""
    with suppress(OSError):
        system = os.statvfs(FOLDER)
        return system.f_frsize * system.f_bavail
    return None


@lru_cache(1)
def _said() -> list[str]:
    return []


def say_once(why: str = f"{FOLDER} has no room for a batch: ") -> None:
    """Print to stderr that batches go through pipes, once per process and only on one rank of a machine."""
    if not _said() and os.environ.get("LOCAL_RANK", "0") == "0":
        _said().append(why)
        line = f"{why}batches go through pipes, which takes more CPU time. For more room: docker run --shm-size=8g"
        say(line, error=True)
