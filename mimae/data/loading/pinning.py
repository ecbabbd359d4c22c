"""Results in page-locked memory, from which a copy to a GPU is asynchronous. A thread copies them there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

_Job: TypeAlias = tuple[Callable[[], Any], Future[Any]]


def pinned(made: Any) -> Any:
    """Return a result in page-locked memory, if it has a method `pin_memory`; otherwise as it is."""
    pin = getattr(made, "pin_memory", None)
    return made if pin is None else pin()


class PinThread:
    """A thread that calls functions one after the other, for the GPU that is current where it is made."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._jobs,), daemon=True)
        self._thread.start()
        self.submit(partial(_prepare, torch.cuda.current_device()))()  # It raises what the GPU says.

    def submit(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Let the thread make a call. Returns a function that waits for its result, and raises its exception."""
        future: Future[Any] = Future()
        self._jobs.put((call, future))
        return future.result

    def end(self, seconds: float) -> None:
        """Let the thread end after the calls that it was given, and wait for it for some seconds."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:  # The garbage collector may run in any thread.
            self._thread.join(seconds)


def _prepare(device: int) -> None:
    torch.cuda.set_device(device)  # Each thread has its own; memory pinned for another GPU would take room on it.
    torch.set_num_threads(1)


def _run(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        call, future = job
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del job, call, future  # They would keep a result until the next one comes.
