"""Parallel work on many items in several processes, with progress."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mimae.data.loading.batch import DataError
from mimae.outside.progress import track

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


def over(
    items: Sequence[T], work: Callable[[S, T], R], shared: S, *, workers: int, title: str, unit: str = ""
) -> Iterator[R]:
    """Yield `work(shared, item)` for each item, in order. Raises DataError if a process dies.

    `title` and `unit` are shown with the progress.
    """
    count = max(1, min(workers, len(items)))
    with ProcessPoolExecutor(count, initializer=_begin, initargs=(os.getpid(), work, shared)) as pool:
        try:
            yield from track(pool.map(_work, items), title, len(items), unit)
        except BrokenProcessPool as error:
            raise DataError(
                f"{title}: a process died, most often because memory ran out; start again with fewer --workers"
            ) from error


_job: tuple[Callable[[Any, Any], Any], Any] | None = None
"""Function and shared argument of this process. They are sent once per process and not with each item."""


def _begin(parent: int, work: Callable[[Any, Any], Any], shared: Any) -> None:
    global _job
    _job = (work, shared)
    # Ctrl-C ends a worker silently; the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(item: Any) -> Any:
    assert _job is not None
    work, shared = _job
    return work(shared, item)
