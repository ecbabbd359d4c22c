"""One job for each run directory: by flock on a host, and across hosts by a counter that the owner moves.

flock does not reach other hosts on every shared file system. So the lock file names its owner, and the owner rewrites a
counter in it; who finds the name of another host's owner looks whether the counter moves. Nobody compares clocks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from mimae.errors import RunError
from mimae.outside.files import Folder
from mimae.outside.text import printable

BEAT = 2.0
"""Seconds between two moves of the counter."""

PATIENCE = 10.0
"""Seconds in which the counter of an owner that lives has moved, with room for a file system that tells late."""

_NAME, _WIDTH = "lock", 512


class Owner(NamedTuple):
    """Who works in a run directory."""

    host: str
    boot: str
    """Another one for each start of each host: owners with the same one see each other's flock."""
    pid: int
    token: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"

    @property
    def is_elsewhere(self) -> bool:
        """Return whether the owner is on another host, about which flock may know nothing."""
        return self.boot != _boot()


def read(file: Path) -> Owner | None:
    """Return whom a lock file names; None where it is empty, as a clean end leaves it, or no lock file."""
    return _read(Folder(file.parent), file.name)


def _read(folder: Folder, name: str) -> Owner | None:
    try:
        owner = Owner(**json.loads(folder.read(name, 4 * _WIDTH)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts, numbers = (owner.host, owner.boot, owner.token), (owner.pid, owner.beats)
    is_owner = all(isinstance(each, str) for each in texts) and all(isinstance(each, int) for each in numbers)
    return owner if is_owner else None


def moves(file: Path) -> bool:
    """Return whether an owner writes to a lock file; wait up to PATIENCE seconds for a sign of it."""
    before, end = read(file), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(BEAT / 4)
        if (now := read(file)) != before:
            return now is not None
    return False


class Hold:
    """A job's hold of its run directory. Called before each save it returns where the run is by now; on ranks other
    than the main one it does nothing."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        """The run directory. Other ranks than the main one do not open it."""

    def __call__(self) -> Path | None:
        """Return where the run is, which may have been renamed. Raises RunError where another job has taken it."""
        return None


class Lock(Hold):
    """The main rank's hold."""

    def __init__(self, folder: Folder, file: TextIO) -> None:
        """`file`: the lock file in `folder`, open and locked."""
        super().__init__(folder)
        self._file = file
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

    def __call__(self) -> Path:
        """Raise RunError where another job has taken the directory, having found this one silent."""
        if (other := self._other()) is not None:
            raise RunError(
                f"run.dir={self.folder.path} was taken over by {other} while this process stood still; this one ends "
                "and saves nothing more"
            )
        if self.folder.locate():  # The lock file went with the directory that was deleted.
            made = _open(self.folder)
            fcntl.flock(made, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.dup2(made, self._file.fileno(), inheritable=False)
            os.close(made)
            self._write()
        return self.folder.path

    def _other(self) -> Owner | None:
        owner = _read(self.folder, _NAME)  # not by its path, where another run may stand after a rename
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
def lock(run: Path) -> Iterator[Hold]:
    """Hold the run directory for this job, through the main rank.

    Raises RunError where another job has it, or where it cannot be written.
    """

    from mimae import distributed  # torch, which a look at the owner of a lock does without

    folder = Folder(run)
    if distributed.rank() != 0:
        yield Hold(folder)
        return
    try:
        folder.make()
        file = os.fdopen(_open(folder), "r+")
        if not os.fstat(file.fileno()).st_size:
            os.pwrite(file.fileno(), b" " * _WIDTH, 0)  # room for the owner
    except OSError as error:
        what = f"{_NAME}: " if error.filename == _NAME else ""
        raise RunError(f"run.dir={run} cannot be written: {what}{error.strerror}") from error
    # A forked worker of the data shares the open file, and would hold the lock past this process's end.
    os.register_at_fork(after_in_child=file.close)
    with file:
        owner = read(run / _NAME)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = owner is None or not owner.is_elsewhere or not moves(run / _NAME)
        except OSError:
            is_free = False
        if not is_free:
            raise RunError(f"run.dir={run} is in use by {owner or '?'}; wait for it or choose another run.dir")
        folder.sweep()
        with Lock(folder, file) as held:
            yield held


def _open(folder: Folder) -> int:
    """Return the lock file's descriptor."""
    descriptor = folder.open(_NAME, os.O_RDWR | os.O_CREAT)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "it has another name too (a hard link), whose content it would overwrite", _NAME)
    return descriptor


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
