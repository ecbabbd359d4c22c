"""The watchdog of a rank: when there is no progress, the process writes its stacks and exits.

The timer is faulthandler's, in a C thread that needs neither the main thread nor the interpreter lock. So it also ends
hangs in a collective or inside a library. `launch/hangs.py` reads the stacks.
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
"""Number of frames of a rank's main thread that are printed. The stack file has all frames of all threads."""

_WIDTH = 80
_MARGIN = 60.0
_STDERR = 2


def patience(first_step_timeout: float, step_timeout: float) -> float | None:
    """Return the seconds that a collective may wait for its peers.

    They are more than the watchdog's limit, because the watchdog reports more. Without a watchdog it is None, which
    stands for torch's own limit.
    """
    if 0 in (first_step_timeout, step_timeout):
        return None
    return max(first_step_timeout, step_timeout) + _MARGIN


class Watchdog:
    """A timer that exits this process with code 1 when an operation takes longer than its limit.

    The stacks of all threads are then in RUN/stacks/rank-R.txt, below a line that names the operation. The file is new
    at each start. Without the file, or for a run of one rank, the stacks go to stderr. SIGUSR2 writes the stacks
    without ending the process.
    """

    def __init__(self, run: Path, first_step_timeout: float, step_timeout: float) -> None:
        """Limits in seconds; 0 stands for no limit."""
        self._long, self._short = first_step_timeout, step_timeout
        self._limit, self._set = 0.0, 0.0
        self.due = ""
        """Description of the operation that the watchdog times."""
        self._file: IO[bytes] | None = None
        if distributed.world_size() > 1:
            # If it cannot be written, the run continues: writing its checkpoints will show if that matters.
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
        """Start the timer for `what`: run.step_timeout, or run.first_step_timeout if `long`."""
        self.due = what
        if self._file is not None:
            with suppress(OSError):  # a full disk
                os.pwrite(self._file.fileno(), what[:_WIDTH].ljust(_WIDTH).encode(), 0)
        limit, now = self._long if long else self._short, time.monotonic()
        # Setting the timer starts a thread, too much work for every step of a small model. So it is set less often, and
        # the limit may be shorter by as much.
        if limit == self._limit and now - self._set < min(1.0, limit / 10):
            return
        self._limit, self._set = limit, now
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True, file=self._file or _STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()


class Stack(NamedTuple):
    """The stack that a rank wrote: the operation, its limit (h:mm:ss), and the last frames of its main thread."""

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
