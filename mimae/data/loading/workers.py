"""Worker processes, built on torch's DataLoader, that prefetch whole micro-batches in order for every loader."""

from __future__ import annotations

import multiprocessing.connection
import os
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from mimae.data.loading.batch import DataError
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.shared_memory import Empty, Slots, handed_over, unshared
from mimae.ranks.place import number as variable

Made = TypeVar("Made")
Made_co = TypeVar("Made_co", covariant=True)


class Make(Protocol[Made_co]):
    """Makes the result of a request. Large tensors are best made by `empty`: then they are not copied any more."""

    def __call__(self, request: BatchRequest, *, empty: Empty) -> Made_co: ...


class Workers(Generic[Made]):
    """Worker processes that call `make` for each request. The results come in the order of the requests.

    `workers` is the number of processes; None: one per core of this rank; 0: the calling process does the work.
    The large tensors of a result are in shared memory, which is used again when the caller has dropped all of them:
    clone what is to be kept for long. The processes live until `close`.
    """

    def __init__(self, make: Make[Made], workers: int | None) -> None:
        workers = default_workers() if workers is None else workers
        self._requests = _Requests()
        self._running: Generator[Made, None, None] | None = None
        with warnings.catch_warnings():
            # torch warns about more workers than cores; `stalls` reports it if training waits for them.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            self._loader: DataLoader | None = DataLoader(
                _MicroBatches(make, Slots(workers)),
                batch_size=None,
                sampler=self._requests,
                num_workers=workers,
                collate_fn=_as_is,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=workers > 0,
                worker_init_fn=_Guard(os.getpid()),
                # A separate generator, so that the loader does not change torch's global random state.
                generator=torch.Generator(),
            )

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Made]:
        """Yield the results for `requests` in order. An unfinished earlier iteration is ended. Raises DataError."""
        if self._loader is None:
            raise ValueError("the loader is closed")
        if self._running is not None:
            self._running.close()
        self._requests.requests = requests
        self._running = self._run()
        return self._running

    def close(self) -> None:
        """Stop the workers."""
        if self._running is not None:
            self._running.close()
        # The workers end with the last reference to the DataLoader, and an error's traceback may hold one.
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in getattr(iterator, "_workers", ()):
                # One that was stopped takes no other signal, and the process would wait for it at its end.
                if worker.is_alive():
                    worker.kill()
        self._running = self._loader = None

    def _run(self) -> Generator[Made, None, None]:
        try:
            for made in self._iterator():
                if isinstance(made, DataError):
                    raise made
                yield made
        except (RuntimeError, ConnectionError, EOFError) as error:
            # ConnectionError and EOFError mean that a worker died while it sent a batch.
            # An error from a living worker names its process too, but without "(pid".
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise DataError(
                f"a decoding process died ({self._ends() or error}). Most often memory ran out: lower data.workers or "
                f"the micro-batch."
            ) from error.with_traceback(None)

    def _ends(self) -> str:
        """Return how worker processes have ended, for example "process 12 by SIGKILL"."""
        iterator: Any = getattr(self._loader, "_iterator", None)
        workers = getattr(iterator, "_workers", ())
        # A process closes its pipes before it ends, and its exit code is there only at the end.
        closed = multiprocessing.connection.wait([worker.sentinel for worker in workers], 2.0)
        for worker in workers:
            if worker.sentinel in closed:
                worker.join(2.0)
        ends = {worker.pid: worker.exitcode for worker in workers}
        return ", ".join(
            f"process {pid} " + (f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}")
            for pid, code in ends.items()
            if code is not None
        )

    def _iterator(self) -> Iterator[Made | DataError]:
        """Return the DataLoader's iterator without torch's SIGCHLD handler.

        That handler raises an error for a dead worker wherever the main thread is, for instance during a save. The
        next batch detects the death too, within seconds.
        """
        assert self._loader is not None
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        try:
            iterator = iter(self._loader)
        except OSError as error:
            _forget_half_made(error)
            raise DataError(
                f"no decoding processes can be started ({error.strerror or error}); their locks need some room in "
                f"/dev/shm (docker run --shm-size=1g), or data.workers=0"
            ) from error
        if is_main:  # No other thread may set signal handlers.
            signal.signal(signal.SIGCHLD, handler)
        return iterator


def _forget_half_made(error: OSError) -> None:
    """Mark the iterator that torch could not finish as shut down; its end would print a traceback of its own."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if type(made).__name__ == "_MultiProcessingDataLoaderIter":
            vars(made).setdefault("_shutdown", True)


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


class _Requests(Sampler[BatchRequest]):
    """Sampler that gives the DataLoader the requests of the current iteration."""

    requests: Iterable[BatchRequest] = ()

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.requests)


class _MicroBatches(Dataset[Any]):
    """Maps a request to its result. A DataError is returned as a value, because torch would wrap it in a traceback."""

    def __init__(self, make: Make[Any], slots: Slots) -> None:
        self.make, self.slots = make, slots

    def __getitem__(self, request: BatchRequest) -> Any:
        worker = get_worker_info()
        slot = None if worker is None else self.slots.free(worker.id)
        try:
            made = self.make(request, empty=unshared if slot is None else slot.empty)
        except DataError as error:
            return error
        return made if worker is None else handed_over(made, slot)


def _as_is(made: Any) -> Any:
    return made


class _Guard:
    """Prepares a worker process.

    Only the parent reacts to signals that are sent to the whole job. Workers continue until the parent stops them, so
    that it gets the batches that it still needs. They exit when the parent does, for whatever reason.
    """

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            signalled = signal.sigtimedwait({signal.SIGTERM}, 2.0)
            if os.getppid() != self.parent or (signalled is not None and signalled.si_pid == self.parent):
                os._exit(0)
