"""A stage's processes: they are started as a group of their own, and all of them are ended together."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

GRACE = 3.0
"""Seconds between two signals that ask a group to end, and after the last one, which cannot be refused."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""They end a group, in this order. With SIGINT, pytest writes the results that it has, and Python runs `finally`."""

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Group:
    """A process and all that it starts, in a session of its own."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        with output.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_prepare,
            )
        self._known: set[int] = {self._process.pid}

    def poll(self) -> int | None:
        # Those that begin a session of their own are found while their parents live.
        self._known |= descendants(self._known)
        return self._process.poll()

    def end(self) -> None:
        self._known |= descendants(self._known)
        for number in SIGNALS:
            self._send(number)
            end = time.monotonic() + GRACE
            while self._lives() and time.monotonic() < end:
                time.sleep(0.05)
                self._process.poll()
        self._process.wait()

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        for pid in self._known - {self._process.pid}:
            if parent(pid) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _lives(self) -> bool:
        return any(parent(pid) is not None for pid in self._known)


def _prepare() -> None:
    """Let a new process be killed when its parent dies, and let it receive SIGINT, which background jobs ignore."""
    if _LIBC is not None:
        _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(roots: set[int]) -> set[int]:
    """Return the processes that these have started, and those that they have."""
    parents = {int(entry.name): parent(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    found, size = set(roots), 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - roots


def parent(pid: int) -> int | None:
    """Return the parent of a process that has not ended, else None."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


@contextmanager
def raising() -> Iterator[None]:
    """Raise SystemExit at SIGTERM and SIGHUP, so that `finally` runs. A second signal does not interrupt it.

    SIGHUP stays ignored under nohup.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
