"""Cache of a source's samples, encoded or as pixels, in RAM or on a local disk, shared by all processes of a node.

A cache is a folder with two files. `data` contains the samples in the order in which they were first read. `index`
contains a header and 16 bytes per sample: its offset in `data`, its length and its CRC. A sample is appended under a
lock and then entered in the index. Every read is verified: if the CRC does not match, the sample is read from the
source again and appended again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Share
from mimae.data.pixels.decode import BadImage, whole
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.outside.paths import user_path
from mimae.outside.text import say

SPARE = 0.1
"""Fraction of its file system that a cache leaves free, for whatever else of this machine is there."""

_RAM = Path("/dev/shm")
_VERSION = 1
_HEADER = 32
_FULL = "full"
_ENTRY = struct.Struct("<qII")


class _Entry(NamedTuple):
    """A sample's entry in the index; all zeros if the sample is not in the cache."""

    at: int
    length: int
    crc: int


class Cached:
    """A source with a cache in front of it. Each sample is read from the source once, as long as the cache has room.

    With `data.cache=decoded` every sample is returned as upright RGB in an uncompressed format, even if it is not
    cached, so that a run's pixels do not depend on the content of the cache. Bytes that are not an image are returned
    unchanged.
    """

    def __init__(self, settings: DataSettings, source: Source) -> None:
        """Open the cache of the source, or create an empty one. Raises DataError if its folder cannot be used."""
        self._source, self._max_pixels, self._white = source, settings.max_pixels, settings.range
        self._decoded = settings.cache == "decoded"
        self._folder = folder = cache_folder_of(settings, source)
        header = hashlib.sha256(f"{_VERSION} {folder.name} {len(source)}".encode()).digest()
        try:
            _make_own(folder.parent)
            folder.mkdir(exist_ok=True)
            with _locked(folder):
                self._index = _open_index(folder, header, _HEADER + _ENTRY.size * len(source))
                self._data = open(folder / "data", "a+b", buffering=0)  # noqa: SIM115
            self._filling = _room(folder) > 0
            if self._filling:
                (folder / _FULL).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache={settings.cache} cannot use {folder}: {error.strerror or error}; "
                f"set data.cache_dir to a writable folder, or set data.cache=null"
            ) from error

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def labels(self) -> np.ndarray | None:
        return self._source.labels

    @property
    def classes(self) -> list[str] | None:
        return self._source.classes

    @property
    def notes(self) -> tuple[str, ...]:
        return self._source.notes

    @property
    def shares(self) -> tuple[Share, ...]:
        return self._source.shares

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def path(self, i: int) -> str:
        return self._source.path(i)

    def read(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        entry, data = self._find(i)
        if data is not None:
            return data
        data = self._source.read(i)
        if self._decoded:
            try:
                data = _pixels(data, self._max_pixels, self._white)
            except BadImage:  # The decoder reports the reason.
                return data
        if self._filling and data:
            self._keep(i, data, entry)
        return data

    def _find(self, i: int) -> tuple[_Entry, bytes | None]:
        """Return the sample's entry in the index, and its bytes if their CRC matches."""
        entry = _Entry(0, 0, 0)
        with suppress(OSError):  # A failing disk is treated as an empty cache.
            entry = self._entry(i)
            # A length from a damaged index could exceed memory, so it is checked against the file's size.
            if 0 < entry.length <= os.fstat(self._data.fileno()).st_size - entry.at and entry.at >= 0:
                data = os.pread(self._data.fileno(), entry.length, entry.at)
                if zlib.crc32(data, i) == entry.crc:
                    return entry, data
        return entry, None

    def _entry(self, i: int) -> _Entry:
        return _Entry(*_ENTRY.unpack(os.pread(self._index.fileno(), _ENTRY.size, _HEADER + i * _ENTRY.size)))

    def _keep(self, i: int, data: bytes, found: _Entry) -> None:
        """Append a sample, unless another process has done so: then its entry no longer equals `found`."""
        try:
            if _room(self._folder) < len(data):
                raise OSError(errno.ENOSPC, f"{SPARE:.0%} of the file system stay free")
            # The file is opened again: processes that share an open file after a fork also share its lock.
            with open(self._folder / "data", "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.path.samestat(os.fstat(file.fileno()), os.fstat(self._data.fileno())):
                    raise OSError(errno.ENOENT, "it was removed")
                if self._entry(i) != found:
                    return
                at = file.seek(0, os.SEEK_END)
                if file.write(data) < len(data):
                    file.truncate(at)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                entry = _ENTRY.pack(at, len(data), zlib.crc32(data, i))
                os.pwrite(self._index.fileno(), entry, _HEADER + i * _ENTRY.size)
        except OSError as error:
            self._filling = False
            self._say_once(f"the cache {self._folder} takes no more samples, and the run continues: {error.strerror}")

    def _say_once(self, line: str) -> None:
        """Print a line, unless another process has already printed it."""
        with suppress(OSError):
            try:
                os.close(os.open(self._folder / _FULL, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
        say(line, error=True)


def cached(settings: DataSettings, source: Source) -> Source:
    """Return the source, with a cache in front of it if `data.cache` is set."""
    return source if settings.cache is None else Cached(settings, source)


def cache_note(settings: DataSettings, source: Source) -> str:
    """Return a line about the cache that a loader has opened: its folder, its size and how to remove it."""
    folder = cache_folder_of(settings, source)
    size, room = (folder / "data").stat().st_size, max(_room(folder), 0)
    return (
        f"data.cache={settings.cache}: {size / 1e6:,.0f} MB are kept, with room for {room / 1e6:,.0f} MB more; "
        f"they stay after the run, until: rm -r {folder}"
    )


class Fullness:
    """Tells once of a cache that takes no more samples, and holds a part of the data set only."""

    def __init__(self, settings: DataSettings, source: Source) -> None:
        self._settings, self._source = settings, source
        self._is_told = settings.cache is None

    def verdict(self) -> str | None:
        """Return a sentence on a cache that is too small, with the remedy."""
        if self._is_told:
            return None
        folder, samples = cache_folder_of(self._settings, self._source), len(self._source)
        try:
            if not (folder / _FULL).exists():
                return None
            entries = np.fromfile(folder / "index", dtype="<i8,<u4,<u4", offset=_HEADER)
        except OSError:
            return None
        self._is_told = True
        held = int(np.count_nonzero(entries["f1"]))
        if held >= samples:
            return None
        return (
            f"the cache is too small: data.cache={self._settings.cache} holds {held:,} of {samples:,} samples "
            f"({held / samples:.0%}), and the others are read from storage in every epoch: set data.cache_dir to a "
            "larger disk of this machine, or make the images smaller with mimae data pack --shortest"
        )


def cache_folder_of(settings: DataSettings, source: Source) -> Path:
    """Return the folder of a source's cache. Copies in other places (resized ones, say) have caches of their own."""
    if settings.cache_dir is None and not _RAM.is_dir():
        raise DataError(
            f"data.cache={settings.cache} keeps samples in {_RAM}, which this system does not have; "
            f"set data.cache_dir to a folder on a disk of this machine"
        )
    base = _RAM if settings.cache_dir is None else user_path(settings.cache_dir).absolute()
    starts = np.cumsum([0, *(share.samples for share in source.shares[:-1])]).tolist()
    what = "\0".join([source.fingerprint, *map(source.path, starts)])
    key = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    # Decoded pixels depend on data.range.
    scaled = f"-{settings.range}" if settings.cache == "decoded" and settings.range is not None else ""
    return base / f"mimae-cache-{os.getuid()}" / f"{key}-{settings.cache}{scaled}"


def _make_own(folder: Path) -> None:
    """Make a folder that only this user can write to, because /dev/shm is world-writable. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by other users")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock that serializes opening and creating the cache."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_index(folder: Path, header: bytes, size: int) -> io.FileIO:
    """Open the index. If it is missing or has another header or size, replace it and the data by empty ones."""
    with suppress(FileNotFoundError):
        index = open(folder / "index", "r+b", buffering=0)  # noqa: SIM115
        if os.pread(index.fileno(), _HEADER, 0) == header and os.fstat(index.fileno()).st_size == size:
            return index
        index.close()
    for stale in ("index", "data"):
        (folder / stale).unlink(missing_ok=True)
    index = open(folder / "index", "x+b", buffering=0)  # noqa: SIM115
    index.truncate(size)
    os.pwrite(index.fileno(), header, 0)
    return index


def _room(folder: Path) -> float:
    """Return the number of bytes that may still be written to the folder's file system."""
    system = os.statvfs(folder)
    return system.f_frsize * (system.f_bavail - SPARE * system.f_blocks)


def _pixels(data: bytes, max_pixels: int, white: int | None) -> bytes:
    """Return the image as upright RGB in PPM format: a header and the pixels. Raises BadImage."""
    image = whole(data, max_pixels, white)
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()
