"""The watchdog of a rank: where nothing moves any more, the process leaves its stacks and ends.

faulthandler keeps the time, in a thread of C that needs neither the main thread nor the interpreter's lock: a hang in a
collective or inside of a library ends as one in Python does. `launch/hangs.py` reads the stacks.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from mimae import distributed
from mimae.outside.files import Folder
from mimae.outside.text import say

FRAMES = 6
"""Frames of a rank's main thread that are read from a file of stacks, which holds all frames of all threads."""

_WIDTH = 80
_MARGIN = 60.0
_STDERR = 2


def patience(first_step_timeout: float, step_timeout: float) -> float | None:
    """Return the seconds that a collective may wait for its peers: longer than the watchdog waits, which knows more.

    Without a watchdog it is None: torch's own limit."""
    if 0 in (first_step_timeout, step_timeout):
        return None
    return max(first_step_timeout, step_timeout) + _MARGIN


class Watchdog:
    """Ends this process with exit code 1 when the thing that it waits for takes longer than its limit.

    RUN/stacks/rank-R.txt, begun anew at each start, then has the stacks of all threads, below a line that says what was
    waited for; without such a file, and for a rank alone, stderr has them. SIGUSR2 writes them too, and ends nothing.
    """

    def __init__(self, run: Path, first_step_timeout: float, step_timeout: float) -> None:
        """Limits in seconds, 0: none."""
        self._long, self._short = first_step_timeout, step_timeout
        self._limit, self._set = 0.0, 0.0
        self.due = ""
        """Description of what is waited for."""
        self._file: IO[bytes] | None = None
        if distributed.world_size() > 1:
            # Where it cannot be written the run goes on: whether that matters, its checkpoints say.
            path = stacks(run) / f"rank-{distributed.rank()}.txt"
            try:
                run.mkdir(parents=True, exist_ok=True)
                self._file = os.fdopen(Folder(run).create(str(path.relative_to(run))), "wb", buffering=0)
                self._file.write(b" " * _WIDTH + b"\n")
            except OSError as error:
                say(f"{path} cannot be written: {error.strerror}; a hang leaves no stack of this rank")

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR2, file=self._file or _STDERR)
        self.wait_for("the start", long=True)
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self._file is not None:
            self._file.close()

    def wait_for(self, what: str, long: bool = False) -> None:
        """Wait for `what`, which is due within run.step_timeout, or if `long` within run.first_step_timeout."""
        self.due = what
        if self._file is not None:
            with suppress(OSError):  # a full disk
                os.pwrite(self._file.fileno(), what[:_WIDTH].ljust(_WIDTH).encode(), 0)
        limit, now = self._long if long else self._short, time.monotonic()
        # Setting it starts a thread, which is much for every step of a small model: the limit may be so much shorter.
        if limit == self._limit and now - self._set < min(1.0, limit / 10):
            return
        self._limit, self._set = limit, now
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True, file=self._file or _STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()


class Stack(NamedTuple):
    """The stack that a rank left: what it waited for, for how long (h:mm:ss), and the last frames of its main
    thread."""

    waited_for: str
    limit: str
    frames: list[str]


def stacks(run: Path) -> Path:
    """Return the folder of a run's stacks."""
    return run / "stacks"


def read(text: str) -> Stack:
    """Parse a file of stacks. faulthandler writes the latest frame first, and the main thread last."""
    limit = re.search(r"^Timeout \((.*)\)!$", text, re.MULTILINE)
    frames = [line.strip() for line in text.rpartition("hread 0x")[2].splitlines()[1:] if line.strip()]
    return Stack(text[:_WIDTH].strip(), limit[1] if limit else "", frames[:FRAMES])
