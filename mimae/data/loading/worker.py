"""A decoding process: it answers requests for micro-batches, one after the other."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import traceback
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch
from torch._utils import ExceptionWrapper

from mimae.data.loading.batch import DataError
from mimae.data.loading.channel import Channel, Lost
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.shared_memory import Empty, Slots, arrived, handed_over, unshared

Made_co = TypeVar("Made_co", covariant=True)


class Make(Protocol[Made_co]):
    """Makes the result of a request. Large tensors are best made by `empty`: then they are not copied any more."""

    def __call__(self, request: BatchRequest, *, empty: Empty) -> Made_co: ...


class Worker:
    """A decoding process, as the process that reads its results sees it."""

    def __init__(self, make: Make[Any], slots: Slots, number: int) -> None:
        """Start the process, the one with this number among those that share `slots`. Raises OSError."""
        ours, its = socket.socketpair()
        with its:
            job = (make, slots, number, os.getpid(), its)
            self.process = multiprocessing.Process(target=_serve, args=job, daemon=True)
            try:
                self.process.start()
            except BaseException:
                ours.close()
                raise
        self.channel = Channel(ours, self.process.is_alive)

    def ask(self, request: BatchRequest) -> None:
        """Send a request. Raises Lost."""
        self.channel.send(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))

    def answer(self) -> Any:
        """Return the result of the oldest request, or the exception that it raised: a DataError or an ExceptionWrapper.

        Raises Lost.
        """
        return arrived(self.channel.receive())

    def drop_answers(self) -> None:
        """Receive all results that are not read yet. Raises Lost."""
        while self.channel.received < self.channel.sent:
            self.answer()


def is_worker() -> bool:
    """Return whether this process is a decoding process."""
    return _is_worker


_is_worker = False


def _serve(make: Make[Any], slots: Slots, number: int, parent: int, end: socket.socket) -> None:
    """Answer requests until the channel ends."""
    _prepare(parent)
    channel, results = Channel(end), SimpleQueue[bytes]()
    # A worker that sends takes requests too: otherwise it and its reader could wait for each other.
    threading.Thread(target=_send, args=(channel, results), daemon=True).start()
    with suppress(Lost):
        while True:
            results.put(_result(make, slots, number, pickle.loads(channel.receive())))


def _send(channel: Channel, results: SimpleQueue[bytes]) -> None:
    try:
        while True:
            channel.send(results.get())
    finally:
        os._exit(1)  # The reader has gone, or it would wait for a result that never comes.


def _result(make: Make[Any], slots: Slots, number: int, request: BatchRequest) -> bytes:
    """Return the message with the result of a request, or with the exception that it raised."""
    slot, place = slots.free(number), f"in decoding process {number}"
    try:
        return handed_over(make(request, empty=unshared if slot is None else slot.empty), slot)
    except Exception as error:
        try:
            return handed_over(error if isinstance(error, DataError) else ExceptionWrapper(where=place), None)
        except Exception:  # Some exceptions cannot be pickled.
            return handed_over(DataError(f"{place}:\n{''.join(traceback.format_exception(error))}"), None)


def _prepare(parent: int) -> None:
    """Prepare this process.

    Only the parent reacts to signals that are sent to the whole job. Workers continue until the parent stops them, so
    that it gets the batches that it still needs. They exit when the parent does, for whatever reason.
    """
    global _is_worker
    _is_worker = True
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _watch(parent: int) -> None:
    while True:
        signalled = signal.sigtimedwait({signal.SIGTERM}, 2.0)
        if os.getppid() != parent or (signalled is not None and signalled.si_pid == parent):
            os._exit(0)
