"""One job for each run directory: by flock on a host, and across hosts by a counter that the owner moves.

flock does not reach other hosts on every shared file system. So the lock file names its owner, and the owner rewrites a
counter in it; who finds the name of another host's owner looks whether the counter moves. Nobody compares clocks.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from mimae import distributed
from mimae.errors import RunError

BEAT = 2.0
"""Seconds between two moves of the counter."""

PATIENCE = 10.0
"""Seconds in which the counter of an owner that lives has moved, with room for a file system that tells late."""

_WIDTH = 512


class Owner(NamedTuple):
    """Who works in a run directory."""

    host: str
    boot: str
    """Another one for each start of each host: owners with the same one see each other's flock."""
    pid: int
    token: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is on a host of which flock may say nothing."""
        return self.boot != _boot()


def read(file: Path) -> Owner | None:
    """Who a lock file names; None where it is empty, as a clean end leaves it, or no lock file."""
    try:
        return Owner(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def moves(file: Path) -> bool:
    """Whether an owner writes to a lock file; waits PATIENCE seconds to see that none does."""
    before, end = read(file), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(BEAT / 4)
        if (now := read(file)) != before:
            return now is not None
    return False


class Lock:
    """This job's hold of a run directory."""

    def __init__(self, path: Path, file: TextIO) -> None:
        """`file`: `path`, open and locked."""
        self._path, self._file = path, file
        self._owner = Owner(socket.gethostname(), _boot(), os.getpid(), secrets.token_hex(8))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lock:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._other() is None:
            os.pwrite(self._file.fileno(), b" " * _WIDTH, 0)  # keeps its room on a disk that fills up

    def check(self) -> None:
        """Before a save. Raises RunError where another job has taken the directory, having found this one silent."""
        if (other := self._other()) is not None:
            raise RunError(
                f"run.dir={self._path.parent} was taken over by {other} while this process stood still; this one ends "
                "and saves nothing more"
            )

    def _other(self) -> Owner | None:
        owner = read(self._path)
        return owner if owner is not None and owner.token != self._owner.token else None

    def _beat(self) -> None:
        while not self._over.wait(BEAT) and self._other() is None:
            self._owner = self._owner._replace(beats=self._owner.beats + 1)
            with suppress(OSError):  # a full disk
                self._write()

    def _write(self) -> None:
        text = json.dumps(self._owner._asdict()).ljust(_WIDTH)
        os.pwrite(self._file.fileno(), text.encode(), 0)
        os.fsync(self._file.fileno())  # to where other hosts read


@contextmanager
def lock(run: Path) -> Iterator[Callable[[], None]]:
    """Holds the run directory for this job, through the main rank. Raises RunError where another job has it, or where
    it cannot be written.

    Gives what is to be called before each save: `Lock.check`, on the other ranks nothing.
    """
    if distributed.rank() != 0:
        yield lambda: None
        return
    path = run / "lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        if not os.fstat(file.fileno()).st_size:
            os.pwrite(file.fileno(), b" " * _WIDTH, 0)  # room for the owner
    except OSError as error:
        raise RunError(f"run.dir={run} cannot be written: {error.strerror}") from error
    # A forked worker of the data shares the open file, and would hold the lock past this process's end.
    os.register_at_fork(after_in_child=file.close)
    with file:
        owner = read(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = owner is None or not owner.is_elsewhere or not moves(path)
        except OSError:
            is_free = False
        if not is_free:
            raise RunError(f"run.dir={run} is in use by {owner or '?'}; wait for it or choose another run.dir")
        with Lock(path, file) as held:
            yield held.check


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
