"""The lock of a run directory: flock on one host, and a counter that the owner increments across hosts.

On some shared file systems flock does not reach other hosts. So the lock file names its owner, and the owner increments
a counter in it. A job that finds an owner on another host watches for a change of the counter. Clocks are not compared.
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
"""Seconds between two increments of the counter."""

PATIENCE = 10.0
"""Seconds within which the counter of a live owner changes, with room for a file system that delays updates."""

_NAME, _WIDTH = "lock", 512


class Owner(NamedTuple):
    """The process that works in a run directory."""

    host: str
    boot: str
    """Identifier of a boot of a host. Owners with the same one see each other's flock."""
    pid: int
    token: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"

    @property
    def is_elsewhere(self) -> bool:
        """Return whether the owner is on another host, where flock may have no effect."""
        return self.boot != _boot()


def read(file: Path) -> Owner | None:
    """Return the owner that a lock file names.

    Returns None for a file that is empty, as after a clean end, or that is not a lock file.
    """
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
    """Return whether an owner writes to a lock file; wait for a change for up to PATIENCE seconds."""
    before, end = read(file), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(BEAT / 4)
        if (now := read(file)) != before:
            return now is not None
    return False


class Hold:
    """A job's ownership of its run directory.

    It is called before each save and returns the present path of the run. On ranks other than the main one it does
    nothing.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        """The run directory. Only the main rank opens it."""

    def __call__(self) -> Path | None:
        """Return the path of the run, which may have been renamed. Raises RunError if another job has taken it."""
        return None


class Lock(Hold):
    """The main rank's ownership."""

    def __init__(self, folder: Folder, file: TextIO) -> None:
        """Write the owner into `file`: the lock file in `folder`, open and locked."""
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
            os.pwrite(self._file.fileno(), b" " * _WIDTH, 0)  # The padding reserves space in case the disk fills up.

    def __call__(self) -> Path:
        """Raise RunError if another job has taken the directory because this one was silent."""
        if (other := self._other()) is not None:
            raise RunError(
                f"run.dir={self.folder.path} was taken over by {other} while this process was stopped; this one ends "
                "without saving"
            )
        if self.folder.locate():  # The directory was deleted, and the lock file with it.
            made = _open(self.folder)
            fcntl.flock(made, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.dup2(made, self._file.fileno(), inheritable=False)
            os.close(made)
            self._write()
        return self.folder.path

    def _other(self) -> Owner | None:
        owner = _read(self.folder, _NAME)  # Not by its path: after a rename another run may be there.
        return owner if owner is not None and owner.token != self._owner.token else None

    def _beat(self) -> None:
        while not self._over.wait(BEAT) and self._other() is None:
            self._owner = self._owner._replace(beats=self._owner.beats + 1)
            with suppress(OSError):  # The disk is full.
                self._write()

    def _write(self) -> None:
        text = json.dumps(self._owner._asdict()).ljust(_WIDTH)
        os.pwrite(self._file.fileno(), text.encode(), 0)
        os.fsync(self._file.fileno())  # Other hosts then read the new count.


@contextmanager
def lock(run: Path) -> Iterator[Hold]:
    """Reserve the run directory for this job, through the main rank.

    Raises RunError if another job has it, or if it cannot be written.
    """

    from mimae import distributed  # It imports torch, which reading the owner of a lock does not need.

    folder = Folder(run)
    if distributed.rank() != 0:
        yield Hold(folder)
        return
    try:
        folder.make()
        file = os.fdopen(_open(folder), "r+")
        if not os.fstat(file.fileno()).st_size:
            os.pwrite(file.fileno(), b" " * _WIDTH, 0)  # This reserves space for the owner.
    except OSError as error:
        what = f"{_NAME}: " if error.filename == _NAME else ""
        raise RunError(f"run.dir={run} cannot be written: {what}{error.strerror}") from error
    # A forked data worker shares the open file, and would otherwise keep the lock after this process has ended.
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
        raise OSError(errno.EMLINK, "it has a second name (a hard link); writing would change that file too", _NAME)
    return descriptor


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
