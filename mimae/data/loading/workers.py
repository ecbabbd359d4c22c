"""Worker processes that prefetch whole micro-batches in order, for every loader."""

from __future__ import annotations

import errno
import itertools
import multiprocessing.connection
import os
import re
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch._utils import ExceptionWrapper

from mimae.data.loading.batch import DataError
from mimae.data.loading.channel import Lost
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.pinning import PinThread, pinned
from mimae.data.loading.shared_memory import Slots, unshared
from mimae.data.loading.worker import Make, Worker
from mimae.ranks.place import number as variable

Made = TypeVar("Made")

AHEAD = 2
"""Results that each worker makes ahead of the one that the caller waits for."""

GRACE = 5.0
"""Seconds within which workers end by themselves, after the batch that they are making. They are killed then."""


class Workers(Generic[Made]):
    """Worker processes that call `make` for each request. The results come in the order of the requests.

    `workers` is the number of processes; None: one per core of this rank; 0: the calling process does the work.
    The large tensors of a result are in shared memory, which is used again when the caller has dropped all of them:
    clone what is to be kept for long. On a GPU results come in page-locked memory. The processes start with the first
    iteration and live until `close`.
    """

    def __init__(self, make: Make[Made], workers: int | None) -> None:
        self._make, self._count = make, default_workers() if workers is None else workers
        self._slots = Slots(self._count)
        self._pins = torch.cuda.is_available()
        self._team: list[Worker] = []
        self._threads: list[PinThread] = []
        """On a GPU, the thread that receives the results."""
        self._starter = 0
        """Process id of the process that has started the workers."""
        self._end: Callable[[], object] = lambda: None
        self._running: Generator[Made, None, None] | None = None
        self._is_closed = False

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Made]:
        """Yield the results for `requests` in order. An unfinished earlier iteration is ended. Raises DataError."""
        if self._is_closed:
            raise ValueError("the loader is closed")
        if self._running is not None:
            self._running.close()
        self._running = self._run(requests) if self._count else self._alone(requests)
        return self._running

    def close(self) -> None:
        """Stop the workers."""
        self._is_closed = True
        if self._running is not None:
            self._running.close()
        self._running = None
        self._end()

    def _alone(self, requests: Iterable[BatchRequest]) -> Generator[Made, None, None]:
        for request in requests:
            made = self._make(request, empty=unshared)
            yield pinned(made) if self._pins else made

    def _run(self, requests: Iterable[BatchRequest]) -> Generator[Made, None, None]:
        if any(worker.channel.is_interrupted for worker in self._team):
            self._end()  # The messages that were on their way are lost, and the slots that they named stay marked.
            self._starter, self._slots = 0, Slots(self._count)
        if self._starter != os.getpid():
            self._start()
        try:
            # Results of an iteration that was ended early.
            for dropped in [self._later(worker.drop_answers) for worker in self._team]:
                dropped()
            yield from self._results(requests)
        except Lost as error:
            ends = self._ends() or str(error)
            likely = ". Most often memory ran out: lower data.workers or the micro-batch" if "SIGKILL" in ends else ""
            raise DataError(f"a decoding process died ({ends}){likely}") from error.with_traceback(None)

    def _results(self, requests: Iterable[BatchRequest]) -> Generator[Made, None, None]:
        waiting: deque[Callable[[], Any]] = deque()
        asked = self._asked(requests, waiting)
        for _ in range(AHEAD * self._count):
            next(asked, None)
        while waiting:
            made = waiting.popleft()()
            next(asked, None)
            if isinstance(made, DataError):
                raise made
            if isinstance(made, ExceptionWrapper):
                made.reraise()
            yield made

    def _asked(self, requests: Iterable[BatchRequest], waiting: deque[Callable[[], Any]]) -> Iterator[None]:
        """Send a request to the next worker for each item, and append a function that returns its result."""
        for request, worker in zip(requests, itertools.cycle(self._team)):
            worker.ask(request)
            waiting.append(self._later(partial(_answer, worker, self._pins)))
            yield

    def _later(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return `call`, or a function that waits for its result if a thread makes the call."""
        return self._threads[0].submit(call) if self._threads else call

    def _start(self) -> None:
        """Start the workers. Raises DataError."""
        self._team, self._threads, self._starter = [], [], os.getpid()
        # They also end with this object, and with this process.
        self._end = weakref.finalize(self, _end, self._starter, self._team, self._threads)
        try:
            for number in range(self._count):
                self._team.append(Worker(self._make, self._slots, number))
            if self._pins:
                self._threads.append(PinThread())
        except BaseException as error:
            self._end()
            self._starter = 0  # The next iteration starts all of them.
            if isinstance(error, OSError):
                raise DataError(_not_started(error)) from error
            raise

    def _ends(self) -> str:
        """Return how worker processes have ended, for example "process 12 by SIGKILL"."""
        processes = [worker.process for worker in self._team]
        # A process closes its channel before it ends, and its exit code is there only at the end.
        closed = multiprocessing.connection.wait([process.sentinel for process in processes], 2.0)
        for process in processes:
            if process.sentinel in closed:
                process.join(2.0)
        ends = {process.pid: process.exitcode for process in processes}
        return ", ".join(
            f"process {pid} " + (f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}")
            for pid, code in ends.items()
            if code is not None
        )


def _answer(worker: Worker, pins: bool) -> Any:
    made = worker.answer()
    return pinned(made) if pins else made


def _end(starter: int, team: list[Worker], threads: list[PinThread]) -> None:
    """End the workers and the thread. It never waits for longer than a few GRACE."""
    if os.getpid() != starter:  # A forked process has a copy of the object, and must not end what its parent uses.
        return
    for worker in team:
        worker.channel.shut()
    for thread in threads:
        thread.end(GRACE)
    end = time.monotonic() + GRACE
    for worker in team:
        worker.process.join(max(0.0, end - time.monotonic()))
    for worker in team:
        # One that was stopped takes no other signal, and this process would wait for it at its end.
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(GRACE)
        worker.channel.close()
    team.clear()  # Each process keeps descriptors.


_LIMITS = {
    errno.EMFILE: "this process may open more files (`ulimit -n`)",
    errno.ENFILE: "this machine may open more files",
    errno.EAGAIN: "more processes may run (`ulimit -u`, or the limit of a container)",
    errno.ENOMEM: "more memory is free",
}
"""What has to change if the system refuses to start a process."""


def _not_started(error: OSError) -> str:
    remedy = _LIMITS.get(error.errno or 0)
    return (
        f"no decoding processes can be started ({error.strerror or error}): lower data.workers, or set data.workers=0"
        + (f", unless {remedy}" if remedy else "")
    )


def default_workers() -> int:
    """Return the number of cores that this rank may use.

    It is the smaller of the CPU affinity and SLURM's allocation, divided by the number of ranks that share them. Raises
    UserError for a variable of SLURM's or torchrun's that is no number.
    """
    name = "SLURM_STEP_TASKS_PER_NODE" if os.environ.get("SLURM_STEP_TASKS_PER_NODE") else "SLURM_TASKS_PER_NODE"
    # For example 8(x4),2 if nodes differ.
    first = {name: re.split("[(,]", os.environ.get(name, ""))[0]}
    tasks = variable(first, name, 1, least=1)
    ranks = variable(os.environ, "LOCAL_WORLD_SIZE", tasks, least=1)
    cores = len(os.sched_getaffinity(0))
    of_task = min(cores, variable(os.environ, "SLURM_CPUS_PER_TASK", cores, least=1))
    of_node = variable(os.environ, "SLURM_CPUS_ON_NODE", cores * ranks, least=1)
    return max(1, min(of_task // max(1, ranks // tasks), of_node // ranks))
