"""Worker processes: whatever happens to one of them, its reader gets the right results or an error, and never hangs."""

from __future__ import annotations

import errno
import gc
import itertools
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mimae.data.loading import shared_memory
from mimae.data.loading.batch import DataError
from mimae.data.loading.channel import Channel
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.pinning import PinThread
from mimae.data.loading.shared_memory import Empty
from mimae.data.loading.worker import is_worker
from mimae.data.loading.workers import Workers

pytestmark = pytest.mark.timeout(120)


class Pinnable:
    """A result that can be pinned, as a batch can be."""

    def __init__(self, step: int, images: torch.Tensor, ids: torch.Tensor) -> None:
        self.step, self.images, self.ids = step, images, ids
        self.pinned_by = ""

    def pin_memory(self) -> Pinnable:
        self.pinned_by = threading.current_thread().name
        return self


def make(request: BatchRequest, *, empty: Empty) -> Pinnable:
    """Return a result whose every value is the number of its step."""
    assert is_worker()
    images = empty((len(request.ids), 16, 16, 3), dtype=torch.uint8).fill_(request.step % 251)
    return Pinnable(request.step, images, torch.from_numpy(request.ids.copy()).fill_(request.step))


def requests(samples: int, steps: int = 10_000) -> Iterator[BatchRequest]:
    return (BatchRequest(0, step, np.arange(samples)) for step in range(steps))


def is_whole(result: Pinnable) -> bool:
    return bool((result.images == result.step % 251).all() and (result.ids == result.step).all())


def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results in shared memory, their small tensors in messages of some 10 KB."""


def pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results in messages of megabytes."""
    monkeypatch.setattr(shared_memory, "_reserved", lambda size: None)


def pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a thread receives the results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def pipes_and_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes(monkeypatch)
    pinning(monkeypatch)


@pytest.fixture(params=[slots, pipes, pinning, pipes_and_pinning], ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    request.param(monkeypatch)
    return request.param.__name__


def processes() -> list[int]:
    return sorted(process.pid for process in multiprocessing.active_children() if process.pid is not None)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def died_within(seconds: float, workers: Workers[Any], results: Iterator[Any]) -> None:
    """Assert that the results end with the error of a dead worker, and that all processes can be stopped."""
    began = time.monotonic()
    with pytest.raises(DataError, match=r"a decoding process died \(process \d+ by SIGKILL"):
        for result in results:
            assert is_whole(result)
    workers.close()
    assert time.monotonic() - began < seconds
    assert not multiprocessing.active_children()


def test_a_worker_is_killed_while_nobody_reads(way: str) -> None:
    """With pipes it then waits in the middle of a message of 4.6 MB. With slots, messages have 48 KB."""
    for victims in ([0], [1], [0, 1]):
        workers = Workers(make, 2)
        results = workers.batches(requests(6000))
        next(results)
        time.sleep(1)
        born = processes()
        for victim in victims:
            os.kill(born[victim], signal.SIGKILL)
        died_within(10, workers, results)


@pytest.mark.parametrize("prepare", [slots, pipes], ids=lambda way: way.__name__)
def test_a_worker_is_killed_at_any_moment(
    prepare: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch)
    draw = random.Random(3)
    for _ in range(12):
        workers = Workers(make, 2)
        results = workers.batches(requests(512))
        next(results)
        kill = threading.Timer(0.2 * draw.random(), os.kill, (draw.choice(processes()), signal.SIGKILL))
        kill.start()
        died_within(10, workers, results)
        kill.join()


def test_the_next_iteration_too_has_the_error_of_a_dead_worker(way: str) -> None:
    workers = Workers(make, 2)
    next(workers.batches(requests(8)))
    os.kill(processes()[0], signal.SIGKILL)
    died_within(10, workers, workers.batches(requests(8)))


def test_closing_takes_no_longer_than_a_batch(way: str) -> None:
    """Nobody reads the results that are under way."""
    workers = Workers(make, 2)
    next(workers.batches(requests(2048)))
    time.sleep(0.5)
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 4
    assert not multiprocessing.active_children()


def test_requests_and_results_may_be_larger_than_what_lies_between_two_processes(way: str) -> None:
    """The reader sends a request while the worker sends a result: neither must wait for the other."""
    workers = Workers(make, 1)
    for _ in range(2):
        assert [result.step for result in workers.batches(requests(40_000, 4)) if is_whole(result)] == [0, 1, 2, 3]
    workers.close()


def test_results_are_in_order_after_iterations_that_ended_early(way: str) -> None:
    """More workers than results, fewer, and results that nobody has read."""
    workers = Workers(make, 3)
    for steps in (1, 2, 20, 7, 0, 4):
        for result in itertools.islice(workers.batches(requests(4, 9)), steps % 5):
            assert is_whole(result)
        results = list(workers.batches(requests(4, steps)))
        assert [result.step for result in results] == list(range(steps)) and all(map(is_whole, results))
        assert {result.pinned_by == "" for result in results} <= {"pinning" not in way}
        assert all(result.pinned_by != "MainThread" for result in results)
    workers.close()


def _wrong(request: BatchRequest, *, empty: Empty) -> object:
    return lambda: "a function has no bytes" if request.step else 0


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    workers = Workers(_wrong, 1)
    with pytest.raises(Exception, match=r"(?i)pickle"):
        next(workers.batches(requests(4)))
    workers.close()


def _slow(request: BatchRequest, *, empty: Empty) -> Pinnable:
    time.sleep(0.3)
    return make(request, empty=empty)


@pytest.mark.parametrize("half_way", [False, True], ids=["while it waits", "inside a message"])
def test_an_interrupted_iteration_leaves_the_workers_usable(half_way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C in a notebook, after which the loader is used again."""
    workers = Workers(_slow, 2)
    results = workers.batches(requests(64))
    next(results)
    if half_way:
        monkeypatch.setattr(Channel, "_some", _interrupt)
    else:
        monkeypatch.setattr(Channel, "_wait", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    monkeypatch.undo()
    for steps in (3, 5):
        assert [result.step for result in workers.batches(requests(64, steps)) if is_whole(result)] == [*range(steps)]
    workers.close()
    assert not multiprocessing.active_children()


def _interrupt(*given: object) -> None:
    raise KeyboardInterrupt


def _raises(request: BatchRequest, *, empty: Empty) -> object:
    class Local(DataError if request.step else ValueError):  # type: ignore[misc]
        """It cannot be pickled."""

    raise Local("the reason")


@pytest.mark.parametrize("first", [0, 1])
def test_an_error_that_cannot_be_pickled_is_told_with_its_traceback(first: int) -> None:
    workers = Workers(_raises, 1)
    with pytest.raises(DataError, match=r"(?s)in decoding process 0:.*in _raises.*the reason"):
        next(workers.batches(itertools.islice(requests(4), first, None)))
    workers.close()


def test_a_gpu_that_a_thread_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pinning(monkeypatch)

    def fails(device: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "set_device", fails)
    workers = Workers(make, 1)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        next(workers.batches(requests(4)))
    assert not multiprocessing.active_children()


def test_a_thread_may_end_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may drop a loader in any thread."""
    pinning(monkeypatch)
    thread = PinThread()
    thread.submit(lambda: thread.end(5.0))()


def test_workers_of_which_one_cannot_start_are_not_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason; otherwise the next iteration would have no worker, and be empty."""
    workers = Workers(make, 1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fork", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            next(workers.batches(requests(4)))
    assert len(list(workers.batches(requests(4, 3)))) == 3
    workers.close()


def _dies(request: BatchRequest, *, empty: Empty) -> object:
    os._exit(3)


def test_a_worker_that_ends_by_itself() -> None:
    workers = Workers(_dies, 1)
    with pytest.raises(DataError, match=r"died \(process \d+ with exit code 3\)"):
        next(workers.batches(requests(4)))
    workers.close()


def test_more_workers_than_cores_are_no_reason_for_a_warning() -> None:
    workers = Workers(make, len(os.sched_getaffinity(0)) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_whole(next(workers.batches(requests(4))))
    workers.close()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "`ulimit -n`"),
        (errno.EAGAIN, "`ulimit -u`"),
        (errno.ENOMEM, "more memory is free"),
        (errno.EPERM, r"data.workers=0$"),
    ],
)
@pytest.mark.parametrize("call", [(socket, "socketpair"), (os, "fork")], ids=["socketpair", "fork"])
def test_workers_that_cannot_start_are_told_in_words(
    call: tuple[Any, str], number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is refused; the first one does not stay. All start when the limit is raised."""
    place, name = call
    real, calls = getattr(place, name), itertools.count()

    def refused(*given: object) -> Any:
        if next(calls):
            raise OSError(number, os.strerror(number))
        return real(*given)

    gc.collect()  # Processes of other tests have descriptors.
    workers, before = Workers(make, 2), descriptors()
    with monkeypatch.context() as limited:
        limited.setattr(place, name, refused)
        with pytest.raises(DataError, match=rf"started \({os.strerror(number)}\): lower data.workers.*{remedy}"):
            next(workers.batches(requests(4)))
        assert not multiprocessing.active_children()
    if name != "fork":  # Python itself leaves some where it fails.
        assert descriptors() == before
    assert is_whole(next(workers.batches(requests(4))))
    workers.close()
