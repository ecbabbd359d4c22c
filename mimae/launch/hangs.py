"""Detection of hangs in the launcher: it prints the stacks that ranks wrote, once, and kills the ranks that remain."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from mimae.faults.watchdog import read, stacks
from mimae.outside.text import say

GRACE = 3.0
"""Seconds after the first rank's stack within which the other ranks may write theirs."""


class Hangs:
    """Watcher of the stack files of a run.

    `look` reports a new hang and kills the ranks of this machine that did not exit by themselves (stopped processes,
    for example), so that all ranks can be restarted.
    """

    def __init__(self, run: Path) -> None:
        self.ended: set[int] = set()
        """Process ids of ranks that a hang ended: they exited by themselves, or `look` killed them."""
        self._folder = stacks(run)
        self._known = self._texts(self._all())

    def look(self, ranks: Mapping[int, int]) -> None:
        """Check the stacks of this machine's ranks. `ranks` maps each rank to its process id."""
        mine = [self._folder / f"rank-{rank}.txt" for rank in ranks]
        if any(read(text).limit for text in self._new(mine).values()):
            self._tell(ranks)

    def _all(self) -> Iterable[Path]:
        """List the stack files. They include those of other machines' ranks if the run's directory is shared."""
        return self._folder.glob("rank-*.txt")

    def _texts(self, files: Iterable[Path]) -> dict[int, str]:
        texts = {}
        for file in files:
            with suppress(OSError, ValueError):
                texts[int(file.stem[5:])] = file.read_text()
        return texts

    def _new(self, files: Iterable[Path]) -> dict[int, str]:
        """Read the stacks that do not belong to an earlier hang."""
        return {rank: text for rank, text in self._texts(files).items() if text != self._known.get(rank)}

    def _tell(self, ranks: Mapping[int, int]) -> None:
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
                line = "\n    ".join([f"in {stack.waited_for}, the latest call first:", *stack.frames])
            elif rank in ranks:
                line = f"left no stack: {states[rank] or 'ended when it lost its peers'}"
            else:
                continue
            alike.setdefault(line, []).append(str(rank))
        limit = max((stack.limit for stack in found.values()), default="its limit")
        lines = [f"mimae: nothing moved for {limit}; whole stacks are in {self._folder}"]
        lines += [f"  rank {', '.join(same)} {line}" for line, same in alike.items()]
        say("\n".join(lines), error=True)
        for pid in ranks.values():
            if _state(pid):
                _send(pid, signal.SIGKILL)
        self._known = self._texts(self._all())


def _settled(ranks: Mapping[int, int]) -> dict[int, str]:
    """Wait until all ranks have exited, for at most GRACE seconds, and return their states."""
    end = time.monotonic() + GRACE
    while any(states := {rank: _state(pid) for rank, pid in ranks.items()}.values()) and time.monotonic() < end:
        time.sleep(0.1)
    return dict(zip(ranks, states))


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _state(pid: int) -> str:
    """Return the state of a child of this process as /proc names it, for example `stopped (T)`.

    Returns an empty text for a process that has exited or is not a child of this one.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    letter, _, word = fields["State"].partition(" ")
    is_ours = fields["PPid"].strip() == str(os.getpid())
    return f"{word.strip('()')} ({letter})" if is_ours and letter not in "ZX" else ""
