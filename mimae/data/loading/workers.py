"""Worker processes on torch's DataLoader: they make whole micro-batches, ahead and in order, for every loader."""

from __future__ import annotations

import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from mimae.data.loading import shared_memory
from mimae.data.loading.batch import DataError
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.shared_memory import Packed, handed_over

Made = TypeVar("Made")


class Workers(Generic[Made]):
    """Worker processes that call `make(request)` for each request and give the results in the requests' order.

    `workers` is their number; None: one per core of this rank; 0: the calling process does the work.
    Results come through shared memory; with `by_pipe`, or where it has no room for one, through a pipe.
    The processes live until `close`.
    """

    def __init__(self, make: Callable[[BatchRequest], Made], workers: int | None, *, by_pipe: bool = False) -> None:
        workers = default_workers() if workers is None else workers
        self._requests = _Requests()
        self._running: Generator[Made, None, None] | None = None
        with warnings.catch_warnings():
            # On more workers than cores; where training waits for them, `stalls` says so.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            self._loader: DataLoader | None = DataLoader(
                _MicroBatches(make, by_pipe),
                batch_size=None,
                sampler=self._requests,
                num_workers=workers,
                collate_fn=_as_is,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=workers > 0,
                worker_init_fn=_Guard(os.getpid()),
                # Its own generator, so that a loader leaves torch's global one alone.
                generator=torch.Generator(),
            )

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Made]:
        """What is made of `requests`, in their order; an earlier run that is not done ends. Raises DataError."""
        if self._loader is None:
            raise ValueError("the loader is closed")
        if self._running is not None:
            self._running.close()
        self._requests.requests = requests
        self._running = self._run()
        return self._running

    def close(self) -> None:
        """Ends the workers."""
        if self._running is not None:
            self._running.close()
        # The workers end with the last reference to the DataLoader, which a frame of an error may hold.
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
                yield made.unpacked() if isinstance(made, Packed) else made
        except (RuntimeError, ConnectionError, EOFError) as error:
            # The latter two where it died while it handed a batch over.
            # An error that a living worker hands over names its process too, but not by "(pid".
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            reason = str(error) or "its pipe closed"
            raise DataError(
                f"a decoding process died ({reason}). Most often memory ran out: lower data.workers or the "
                f"micro-batch, and in a container give /dev/shm more room (docker run --shm-size=8g)."
            ) from error.with_traceback(None)

    def _iterator(self) -> Iterator[Made | DataError]:
        """The DataLoader's iterator, without torch's SIGCHLD handler: that one raises a worker's death wherever
        the main thread is (in the middle of a save, say); the next batch notices it too, within seconds."""
        assert self._loader is not None
        if threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        try:
            iterator = iter(self._loader)
        except OSError as error:
            raise DataError(
                f"no decoding processes can be started ({error.strerror or error}); they need some room in "
                f"{shared_memory.FOLDER} (docker run --shm-size=1g), or data.workers=0"
            ) from error
        signal.signal(signal.SIGCHLD, handler)
        return iterator


def default_workers() -> int:
    """Cores that this rank may use: of its affinity and of what SLURM allots, over the ranks that share them."""
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or "1"
    tasks = int(re.split("[(,]", per_node)[0])  # 8(x4),2 where nodes differ.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", tasks))
    cores = len(os.sched_getaffinity(0))
    of_task = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    shares = [of_task // max(1, ranks // tasks)]
    if "SLURM_CPUS_ON_NODE" in os.environ:
        shares.append(int(os.environ["SLURM_CPUS_ON_NODE"]) // ranks)
    return max(1, min(shares))


class _Requests(Sampler[BatchRequest]):
    """What the DataLoader hands to its workers: the requests of the present run."""

    requests: Iterable[BatchRequest] = ()

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.requests)


class _MicroBatches(Dataset[Any]):
    """What is made of a request; what stops the run comes back as a value: torch would bury it in a traceback."""

    def __init__(self, make: Callable[[BatchRequest], Any], by_pipe: bool) -> None:
        self.make, self.by_pipe = make, by_pipe

    def __getitem__(self, request: BatchRequest) -> Any:
        try:
            made = self.make(request)
        except DataError as error:
            return error
        return made if get_worker_info() is None else handed_over(made, self.by_pipe)


def _as_is(made: Any) -> Any:
    return made


class _Guard:
    """Prepares a worker. A SIGINT or SIGTERM to the whole job is the parent's to answer: workers go on until
    it ends them, so that the batches that it still wants come. They end when it does, however it ends."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            signalled = signal.sigtimedwait({signal.SIGTERM}, 2.0)
            if os.getppid() != self.parent or (signalled is not None and signalled.si_pid == self.parent):
                os._exit(0)
