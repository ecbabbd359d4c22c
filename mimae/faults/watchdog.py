"""Hangs: a rank in which nothing moves any more ends itself and leaves its stacks; the launcher tells them.

faulthandler keeps the time, in a thread of C that needs neither the main thread nor the interpreter's lock: a hang in a
collective or inside of a library ends as one in Python does.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from mimae import distributed
from mimae.files import Folder
from mimae.text import say

FRAMES = 6
"""Of each rank's main thread, that the launcher tells; the file has all, of all threads."""

GRACE = 3.0
"""Seconds after the first rank's stack in which the others may leave theirs."""

_WIDTH = 80
_MARGIN = 60.0
_STDERR = 2


def patience(first_step_timeout: float, step_timeout: float) -> float | None:
    """Seconds that a collective may wait for its peers: longer than the watchdog, which knows more. None without a
    watchdog, for torch's own limit."""
    if 0 in (first_step_timeout, step_timeout):
        return None
    return max(first_step_timeout, step_timeout) + _MARGIN


class Watchdog:
    """Ends this process with exit code 1 when what it waits for takes longer than its limit.

    RUN/stacks/rank-R.txt, begun anew at each start, then has the stacks of all threads, below a line that says what was
    waited for; without such a file, and for a rank alone, stderr has them. SIGUSR2 writes them too, and ends nothing.
    """

    def __init__(self, run: Path, first_step_timeout: float, step_timeout: float) -> None:
        """Limits in seconds, 0: none."""
        self._long, self._short = first_step_timeout, step_timeout
        self._limit, self._set = 0.0, 0.0
        self.due = ""
        """What is waited for."""
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
        """From now on `what` is due, within run.step_timeout or, `long`, within run.first_step_timeout."""
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
    """What a rank left: what it waited for, for how long (h:mm:ss), and the last frames of its main thread."""

    waited_for: str
    limit: str
    frames: list[str]


def stacks(run: Path) -> Path:
    """The folder of the stacks."""
    return run / "stacks"


def read(text: str) -> Stack:
    """A file of stacks. faulthandler writes the latest frame first, and the main thread last."""
    limit = re.search(r"^Timeout \((.*)\)!$", text, re.MULTILINE)
    frames = [line.strip() for line in text.rpartition("hread 0x")[2].splitlines()[1:] if line.strip()]
    return Stack(text[:_WIDTH].strip(), limit[1] if limit else "", frames[:FRAMES])


class Hangs:
    """The launcher's eye on the stacks of a run: tells of a hang once, then ends the ranks of this machine that did not
    end themselves (stopped ones, say), so that all can be started again."""

    def __init__(self, run: Path, ranks: Callable[[], dict[int, int]]) -> None:
        """`ranks`: process ids of this machine's ranks."""
        self.ended: set[int] = set()
        """Process ids of ranks that a hang ended, or its end."""
        self._folder, self._ranks = stacks(run), ranks
        self._known = self._texts(self._all())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Hangs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()  # at what ended all of them at once

    def _watch(self) -> None:
        while not self._over.wait(1):
            self._look()

    def _look(self) -> None:
        ranks = self._ranks()
        mine = [self._folder / f"rank-{rank}.txt" for rank in ranks]
        if any(read(text).limit for text in self._new(mine).values()):
            self._tell(ranks)

    def _all(self) -> Iterable[Path]:
        """Of the ranks of other machines too, where they share the run's directory."""
        return self._folder.glob("rank-*.txt")

    def _texts(self, files: Iterable[Path]) -> dict[int, str]:
        texts = {}
        for file in files:
            with suppress(OSError, ValueError):
                texts[int(file.stem[5:])] = file.read_text()
        return texts

    def _new(self, files: Iterable[Path]) -> dict[int, str]:
        """Stacks that are none of an earlier hang."""
        return {rank: text for rank, text in self._texts(files).items() if text != self._known.get(rank)}

    def _tell(self, ranks: dict[int, int]) -> None:
        self.ended |= set(ranks.values())
        states = _settled(ranks)
        for rank, state in states.items():
            if state:
                _send(ranks[rank], signal.SIGUSR2)
        if any(states.values()):
            time.sleep(0.5)
        found = {rank: read(text) for rank, text in sorted(self._new(self._all()).items())}
        alike: dict[str, list[str]] = {}
        for rank in sorted(found.keys() | ranks.keys()):
            stack = found.get(rank)
            if stack is not None and stack.frames:
                told = "\n    ".join([f"in {stack.waited_for}, the latest call first:", *stack.frames])
            elif rank in ranks:
                told = f"left no stack: {states[rank] or 'ended when it lost its peers'}"
            else:
                continue
            alike.setdefault(told, []).append(str(rank))
        limit = max((stack.limit for stack in found.values()), default="its limit")
        lines = [f"mimae: nothing moved for {limit}; whole stacks are in {self._folder}"]
        lines += [f"  rank {', '.join(same)} {told}" for told, same in alike.items()]
        print("\n".join(lines), file=sys.stderr, flush=True)
        for pid in ranks.values():
            if _state(pid):
                _send(pid, signal.SIGKILL)
        self._known = self._texts(self._all())


def _settled(ranks: dict[int, int]) -> dict[int, str]:
    """The states of the ranks, when all have ended or GRACE is over."""
    end = time.monotonic() + GRACE
    while any(states := {rank: _state(pid) for rank, pid in ranks.items()}.values()) and time.monotonic() < end:
        time.sleep(0.1)
    return dict(zip(ranks, states))


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _state(pid: int) -> str:
    """A child of this process that has not ended, in the words of /proc: `stopped (T)`; else nothing."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    told = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    letter, _, word = told["State"].partition(" ")
    is_ours = told["PPid"].strip() == str(os.getpid())
    return f"{word.strip('()')} ({letter})" if is_ours and letter not in "ZX" else ""
