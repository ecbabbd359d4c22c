"""The files of a run: everything that is written into a run directory, or read from one, is opened here.

A run directory may come from an untrusted source. No name inside it is followed as a symbolic link, neither the last
part of a path nor a folder on the way; only regular files are opened; temporary names cannot be guessed. The directory
itself, and its `checkpoints`, may be links that the user made to another disk.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mimae.errors import RunError, UserError
from mimae.outside.text import say

_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # Without O_NONBLOCK, opening a FIFO waits for its other end.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_LINK = "it is a symbolic link, which a run does not follow"
_STALE = 3600.0
"""Seconds after which a temporary file counts as left by a kill: no small file takes so long to write."""


class Folder:
    """An open directory, and access to the files in it by relative names.

    It stays the same directory when it is renamed. Errors are OSErrors with the name and a readable reason.
    """

    def __init__(self, path: str | Path) -> None:
        """Set the path of the directory; it is opened at the first use."""
        self.path = Path(path)
        """Path of the directory; `locate` updates it."""
        self.tell: Callable[[str], None] = say
        """Function that reports a rename or a deletion to the user."""
        self.moves = 0
        """Number of times that `locate` found the directory renamed or made it again."""
        self._fd: int | None = None
        self._lasting: dict[str, bytes] = {}
        self._locating = threading.Lock()

    def make(self) -> None:
        """Make the directory if it does not exist, and open it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._descriptor()

    def open(self, name: str, flags: int) -> int:
        """Return a descriptor of the regular file `name`, opened with os.open's `flags`; made with O_CREAT.

        O_CREAT also makes the parent folders.
        """
        with self._parent(name, make=bool(flags & os.O_CREAT)) as (parent, last):
            return _open(parent, last, flags)

    def read(self, name: str, limit: int, tail: bool = False) -> bytes:
        """Return the content of a file.

        For a file of more than `limit` bytes, raise OSError, or with `tail` return only the last `limit` bytes.
        """
        with os.fdopen(self.open(name, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit and not tail:
                raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the limit of {limit:,}", name)
            file.seek(max(0, size - limit))
            # Python allocates as many bytes as are asked for.
            return file.read(min(size, limit))

    def exists(self, name: str) -> bool:
        """Return whether anything is called `name`, including a broken link."""
        try:
            with self._parent(name) as (parent, last):
                os.lstat(last, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    def append(self, name: str, content: bytes) -> None:
        """Append all of the content to a file. If it fails with an OSError, nothing is appended."""
        with self._parent(name, make=True) as (parent, last):
            descriptor = _open(parent, last, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            if os.fstat(descriptor).st_nlink > 1:  # The second name may be a file outside the run.
                with os.fdopen(descriptor, "rb") as file:
                    _replace(parent, last, file.read())
                descriptor = _open(parent, last, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            # An incomplete line after a crash must not join the next one.
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                content = b"\n" + content
            written = 0
            try:
                while written < len(content):
                    written += os.write(descriptor, content[written:])
            except OSError as error:
                with suppress(OSError):
                    if written and os.fstat(descriptor).st_size == size + written:
                        os.ftruncate(descriptor, size)
                raise OSError(error.errno, error.strerror, name) from error
        finally:
            os.close(descriptor)

    def create(self, name: str) -> int:
        """Return a descriptor of a new, empty file that replaces an old one."""
        with self._parent(name, make=True) as (parent, last):
            _refuse(parent, last)
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=parent)
            return os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o666, dir_fd=parent)

    def replace(self, name: str, content: str | bytes, lasting: bool = False) -> None:
        """Replace a small file so that a reader, or a kill, sees the old content or the new one.

        A `lasting` file is written again when `locate` makes a deleted directory again.
        """
        content = content.encode() if isinstance(content, str) else content
        if lasting:
            self._lasting[name] = content
        with self._parent(name, make=True) as (parent, last):
            _refuse(parent, last)
            _replace(parent, last, content)

    def folder(self, name: str) -> Path:
        """Make a folder if it does not exist, and return its path."""
        with self._parent(f"{name}/.", make=True):
            return self.path / name

    def entrust(self, name: str) -> Path:
        """Return the path of a folder, as `folder` does, for a library that opens files in it by itself.

        Raises OSError if a symbolic link at any depth leads out of the folder, because the library may follow it.
        """
        folder = self.folder(name)
        home = folder.resolve()
        for parent, folders, names in os.walk(folder):
            for path in (Path(parent, each) for each in (*folders, *names)):
                if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                    raise OSError(errno.ELOOP, f"{path.relative_to(self.path)} is a symbolic link out of it", name)
        return folder

    def sweep(self) -> None:
        """Remove temporary files that a kill left."""
        with suppress(OSError):
            for name in os.listdir(self._descriptor()):
                if _TEMPORARY.fullmatch(name):
                    found = os.lstat(name, dir_fd=self._descriptor())
                    if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _STALE:
                        os.unlink(name, dir_fd=self._descriptor())

    def locate(self) -> bool:
        """Update the path of the directory, and return True if it had to be made again.

        If it was renamed, `path` becomes the new path. If it was deleted, it is made again with its lasting files,
        unless something else has taken its path. Raises RunError if the run has no directory any more.
        """
        with self._locating:
            held = self._descriptor()
            here, there = os.fstat(held), _stat(self.path)
            if there is not None and os.path.samestat(here, there):
                return False
            now = _path_of(held)
            if now is not None:
                self.tell(f"{self.path} was renamed while training; the run continues in {now}")
                self.path, self.moves = now, self.moves + 1
                return False
            if there is not None:
                raise RunError(
                    f"run.dir={self.path} is another directory by now, and the one of this run was deleted; this run "
                    "ends without saving"
                )
            try:
                self.path.mkdir(parents=True)
                made = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                os.dup2(made, held, inheritable=False)
                os.close(made)
                self.moves += 1
                for name, content in self._lasting.items():
                    self.replace(name, content)
            except OSError as error:
                raise RunError(
                    f"run.dir={self.path} was deleted while training, and cannot be made again: {error.strerror}"
                ) from error
            self.tell(
                f"{self.path} was deleted while training; it is made again, without the earlier records and checkpoints"
            )
            return True

    def _descriptor(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._fd

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            with suppress(OSError):
                os.close(self._fd)  # type: ignore[arg-type]

    @contextmanager
    def _parent(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """Yield an open descriptor of the folder of `name`, and the last part of the name."""
        *folders, last = name.split("/")
        if ".." in folders or last in ("", ".."):
            raise OSError(errno.EINVAL, "it is not a name inside the directory", name)
        descriptor = os.dup(self._descriptor())
        try:
            for part in folders:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                try:
                    inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=descriptor)
                except OSError as error:
                    raise _in_words(error, descriptor, part) from None
                os.close(descriptor)
                descriptor = inner
            yield descriptor, last
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a reader, or a kill, sees the old content or the new one.

    Raises OSError with the path as its filename.
    """
    try:
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _replace(parent, path.name, content.encode() if isinstance(content, str) else content)
        finally:
            os.close(parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_report(run: Path, name: str, content: str, out: Path | None) -> Path:
    """Write a report to `out`, by default to the file `name` of a run, and return its path.

    Raises UserError if it cannot be written.
    """
    try:
        if out is None:
            Folder(run).replace(name, content)
        else:
            write_atomically(out, content)
    except OSError as error:
        other = "; --out FILE names another file" if out is None else ""
        raise UserError(f"{out or run / name} cannot be written: {error.strerror}{other}") from error
    return out or run / name


@contextmanager
def made_beside(path: Path) -> Iterator[Path]:
    """Yield a new path in the folder of `path`, where the block makes a file or a folder; it then gets the name `path`.

    The name cannot be guessed. After an error it is removed, and what had the name `path` before stays. What a killed
    process left of an earlier attempt is removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # Another process has just given it its name.
            if _TEMPORARY.fullmatch(left.name) and time.time() - left.lstat().st_mtime > _STALE:
                remove(left)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(last: str) -> str:
    """Return a name that cannot be guessed, in the form of _TEMPORARY."""
    return f".{last}.{secrets.token_hex(8)}.tmp"


def _open(parent: int, last: str, flags: int) -> int:
    try:
        descriptor = os.open(last, flags | _SAFE, 0o666, dir_fd=parent)
    except OSError as error:
        raise _in_words(error, parent, last) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", last)
    return descriptor


def _refuse(parent: int, last: str) -> None:
    """Raise OSError if the name exists and is not a regular file."""
    try:
        mode = os.lstat(last, dir_fd=parent).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, _LINK, last)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", last)


def _replace(parent: int, last: str, content: bytes) -> None:
    temporary = _temporary_name(last)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o666, dir_fd=parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, last, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
        raise


def _in_words(error: OSError, parent: int, part: str) -> OSError:
    """Return the error, with a readable reason if the name is a link."""
    with suppress(OSError):
        if stat.S_ISLNK(os.lstat(part, dir_fd=parent).st_mode):
            return OSError(errno.ELOOP, _LINK, part)
    return error


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _path_of(descriptor: int) -> Path | None:
    """Return the path of an open directory, or None if it was deleted or the system does not report it."""
    try:
        found = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return found if os.path.samestat(found.stat(), os.fstat(descriptor)) else None
    except OSError:
        return None
