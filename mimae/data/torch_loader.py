"""The loader on torch's DataLoader: worker processes make whole micro-batches, ahead and in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mimae.data.augment import Window, below, centre_window, crop_words, flips, random_window
from mimae.data.batch import BadSample, Batch, DataError
from mimae.data.decode import BadImage, decode, why
from mimae.data.order import Job
from mimae.data.settings import DataSettings
from mimae.data.sources import Source
from mimae.randomness import Purpose, words

_REPLACEMENTS = 64
"""Other samples tried in the place of an unreadable one."""


class TorchLoader:
    """Makes batches of jobs, in their order, with `settings.workers` processes (0: in this one).

    The workers live until `close`.
    """

    def __init__(self, settings: DataSettings, source: Source, seed: int) -> None:
        workers = default_workers() if settings.workers is None else settings.workers
        self._jobs = _Jobs()
        self._running: Generator[Batch, None, None] | None = None
        self._loader: DataLoader | None = DataLoader(
            _MicroBatches(settings, source, seed),
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_Guard(os.getpid()),
            # Its own generator, so that a loader leaves torch's global one alone.
            generator=torch.Generator(),
        )

    def batches(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        """The batches of `jobs` in their order; an earlier run that is not done ends. Raises DataError."""
        if self._loader is None:
            raise ValueError("the loader is closed")
        if self._running is not None:
            self._running.close()
        self._jobs.jobs = jobs
        self._running = self._run()
        return self._running

    def close(self) -> None:
        """Ends the workers."""
        if self._running is not None:
            self._running.close()
        # The workers end with the last reference to the DataLoader, so no frame of an error may hold one.
        self._running = self._loader = None

    def _run(self) -> Generator[Batch, None, None]:
        try:
            for made in self._iterator():
                if isinstance(made, DataError):
                    raise made
                yield made
        except (RuntimeError, ConnectionError, EOFError) as error:
            # The latter two where it died while it handed a batch over.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = str(error) or "its pipe closed"
            raise DataError(
                f"a decoding process died ({reason}). Most often memory ran out: lower data.workers or the "
                f"micro-batch, and in a container give /dev/shm more room (docker run --shm-size=8g)."
            ) from error.with_traceback(None)

    def _iterator(self) -> Iterator[Batch | DataError]:
        """The DataLoader's iterator, without torch's SIGCHLD handler: that one raises a worker's death wherever
        the main thread is (in the middle of a save, say); the next batch notices it too, within seconds."""
        assert self._loader is not None
        if threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        iterator = iter(self._loader)
        signal.signal(signal.SIGCHLD, handler)
        return iterator


def default_workers() -> int:
    """Cores that this rank may use: of its affinity or of SLURM's share, over the ranks of the node."""
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Jobs(Sampler[Job]):
    """What the DataLoader hands to its workers: the jobs of the present run."""

    jobs: Iterable[Job] = ()

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


class _MicroBatches(Dataset[Batch | DataError]):
    """A job's micro-batch; what stops the run comes back as a value: torch would bury it in a traceback."""

    def __init__(self, settings: DataSettings, source: Source, seed: int) -> None:
        self.settings, self.source, self.seed = settings, source, seed

    def __getitem__(self, job: Job) -> Batch | DataError:
        try:
            return make_batch(self.settings, self.source, self.seed, job)
        except DataError as error:
            return error


def make_batch(settings: DataSettings, source: Source, seed: int, job: Job) -> Batch:
    """Reads, decodes and cuts the samples of a job. Raises DataError where one cannot even be replaced."""
    size, scale = settings.size_hw, settings.crop_scale
    sample_ids = torch.tensor(job.ids)
    mirrored = flips(seed, job.epoch, sample_ids).tolist() if settings.flip else [False] * len(job.ids)
    windows: list[Callable[[int, int], Window]] = [partial(centre_window, size=size)] * len(job.ids)
    if scale is not None:
        drawn = crop_words(seed, job.epoch, sample_ids).tolist()
        windows = [partial(random_window, row, scale=scale) for row in drawn]
    images = torch.empty((len(job.ids), *size, 3), dtype=torch.uint8)
    pixels, source_ids = images.numpy(), sample_ids.clone()
    bad: list[BadSample] = []
    for slot, (sample_id, window, flip) in enumerate(zip(job.ids.tolist(), windows, mirrored)):
        for candidate in _chain(seed, job.epoch, sample_id, len(source)):
            try:
                data = source.read(candidate)
                pixels[slot] = decode(data, window, size, max_pixels=settings.max_pixels, flip=flip)
                source_ids[slot] = candidate
                break
            except (BadImage, OSError) as error:
                bad.append(BadSample(candidate, source.path(candidate), why(error)))
        else:
            tried = "\n".join(f"  {path}: {reason}" for _, path, reason in bad[-5:])
            raise DataError(
                f"sample {sample_id} of {source.name} cannot be read, nor any of {_REPLACEMENTS} samples "
                f"tried in its place; the last:\n{tried}\nCheck that data.path holds readable images."
            )
    return Batch(images, sample_ids, source_ids, job.epoch, job.step, bad)


def _chain(seed: int, epoch: int, sample_id: int, n: int) -> Iterator[int]:
    """The slot's own sample, then those that take its place, drawn from its stream."""
    yield sample_id % n
    for word in words(seed, Purpose.REPLACEMENT, epoch, torch.tensor([sample_id]), _REPLACEMENTS)[0].tolist():
        yield below(word, n)


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
