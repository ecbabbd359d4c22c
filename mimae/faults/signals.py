"""Signals that ask a run to save and stop, for its ranks and for their launcher."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mimae.errors import RunError

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Signals from an operator, from SLURM before a job's time ends, from a terminal that closes, and from Ctrl-C."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for each signal of WISHES inside the block.

    A signal that this process was started to ignore stays ignored: that is how `nohup` keeps a run alive when its
    terminal closes. SIGINT is the exception: a shell script ignores it for every background job, and `kill -INT` of
    such a job asks it to save. Python lets only the main thread handle signals: in another thread nothing changes, and
    the process itself decides what a signal does.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in WISHES:
            old = signal.getsignal(number)
            # None stands for a handler that was not set by Python, which Python could not restore.
            if old is not None and (old != signal.SIG_IGN or number == signal.SIGINT):
                before[number] = old
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


WAIT_AFTER_SIGNAL = 30.0
"""Seconds that a run waits for the next batch after a signal asked it to stop."""


class Signals:
    """A request to save and stop. All ranks agree on it one step late, through the host."""

    def __init__(self) -> None:
        self.received = False
        self._waits_for = ""
        self._is_main = threading.current_thread() is threading.main_thread()
        self._wish = torch.zeros(1)
        self._work: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Signals:
        self._stack.enter_context(handled(self._on_signal))
        if self._is_main:
            before = signal.signal(signal.SIGALRM, self._on_alarm)
            self._stack.callback(signal.signal, signal.SIGALRM, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._waits_for:
            signal.setitimer(signal.ITIMER_REAL, WAIT_AFTER_SIGNAL)

    def _on_alarm(self, number: int, _: FrameType | None) -> None:
        if self._waits_for:
            raise RunError(
                f"the run was asked to stop, and {self._waits_for} did not come for {WAIT_AFTER_SIGNAL:.0f} s: it ends "
                "without saving; run the same command to resume from the last checkpoint"
            )

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Limit the block's wait after a signal: raise RunError after WAIT_AFTER_SIGNAL seconds."""
        self._waits_for = what
        if self.received and self._is_main:
            signal.setitimer(signal.ITIMER_REAL, WAIT_AFTER_SIGNAL)
        try:
            yield
        finally:
            self._waits_for = ""
            if self.received and self._is_main:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def agreed(self) -> bool:
        """Return True on every rank after the same step, once any of them has received a signal."""
        if self._work is not None:
            self._work.wait()
            if self._wish.item() > 0:
                self.received = True
                return True
        self._wish = torch.full((1,), float(self.received))
        self._work = dist.all_reduce(self._wish, async_op=True)
        return False
