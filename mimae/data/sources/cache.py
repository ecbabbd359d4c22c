"""A source's samples kept in RAM or on a disk of the node, encoded or as pixels, by all processes of the node.

A cache is a folder with two files. `data` holds samples one after the other, as they first came; `index` a header and,
for each sample, 16 bytes: where it lies, its length and its CRC. A sample is appended under a lock and then entered in
the index. Nothing found is trusted: what does not have its CRC is read from the source again, and kept anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
import struct
import sys
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

SPARE = 0.1
"""Share of its file system that a cache leaves free: in RAM the loaders' batches lie there too."""

_RAM = Path("/dev/shm")
_VERSION = 1
_HEADER = 32
_FULL = "full"
_ENTRY = struct.Struct("<qII")


class _Entry(NamedTuple):
    """What the index has of a sample; zeros where it is not kept."""

    at: int
    length: int
    crc: int


class Cached:
    """A source that is asked for each sample once, as long as the cache has room.

    With `data.cache=decoded` samples come as upright RGB in an uncompressed format, kept or not: what a run sees does
    not go by what the cache holds. What is no image comes as it is.
    """

    def __init__(self, settings: DataSettings, source: Source) -> None:
        """Opens the cache of the source, or makes an empty one. Raises DataError where its folder cannot be used."""
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
                f"give data.cache_dir a folder that can be written to, or set data.cache=null"
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
            except BadImage:  # Whoever decodes it will say why.
                return data
        if self._filling and data:
            self._keep(i, data, entry)
        return data

    def _find(self, i: int) -> tuple[_Entry, bytes | None]:
        """What the index has of a sample, and its bytes where they are as they were kept."""
        entry = _Entry(0, 0, 0)
        with suppress(OSError):  # A disk that fails is a cache that is empty.
            entry = self._entry(i)
            # A length that a damaged index makes up would be more than memory holds.
            if 0 < entry.length <= os.fstat(self._data.fileno()).st_size - entry.at and entry.at >= 0:
                data = os.pread(self._data.fileno(), entry.length, entry.at)
                if zlib.crc32(data, i) == entry.crc:
                    return entry, data
        return entry, None

    def _entry(self, i: int) -> _Entry:
        return _Entry(*_ENTRY.unpack(os.pread(self._index.fileno(), _ENTRY.size, _HEADER + i * _ENTRY.size)))

    def _keep(self, i: int, data: bytes, found: _Entry) -> None:
        """Appends a sample, unless another process just has: then its entry is no longer as `found`."""
        try:
            if _room(self._folder) < len(data):
                raise OSError(errno.ENOSPC, f"{SPARE:.0%} of the file system stay free")
            # Opened anew: for processes that share an open file by a fork, a lock on it is one lock.
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
            self._say_once(f"the cache {self._folder} takes no more samples, and the run goes on: {error.strerror}")

    def _say_once(self, line: str) -> None:
        """Prints a line, unless another process has."""
        with suppress(OSError):
            try:
                os.close(os.open(self._folder / _FULL, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
        print(line, file=sys.stderr, flush=True)


def cached(settings: DataSettings, source: Source) -> Source:
    """The source with the cache that `data.cache` asks for."""
    return source if settings.cache is None else Cached(settings, source)


def cache_note(settings: DataSettings, source: Source) -> str:
    """A line on the cache that a loader has opened: where it is, how large, how to be rid of it."""
    folder = cache_folder_of(settings, source)
    size, room = (folder / "data").stat().st_size, max(_room(folder), 0)
    return (
        f"data.cache={settings.cache}: {size / 1e6:,.0f} MB are kept, with room for {room / 1e6:,.0f} MB more; "
        f"they stay after the run, until: rm -r {folder}"
    )


def cache_folder_of(settings: DataSettings, source: Source) -> Path:
    """Where the cache of a source is. Sources that number alike in two places, as resized copies do, have two."""
    if settings.cache_dir is None and not _RAM.is_dir():
        raise DataError(
            f"data.cache={settings.cache} keeps samples in {_RAM}, which this system does not have; "
            f"give data.cache_dir a folder on a disk of this machine"
        )
    base = _RAM if settings.cache_dir is None else Path(settings.cache_dir).expanduser().absolute()
    starts = np.cumsum([0, *(share.samples for share in source.shares[:-1])]).tolist()
    what = "\0".join([source.fingerprint, *map(source.path, starts)])
    key = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    # Pixels are kept as they were scaled.
    scaled = f"-{settings.range}" if settings.cache == "decoded" and settings.range is not None else ""
    return base / f"mimae-cache-{os.getuid()}" / f"{key}-{settings.cache}{scaled}"


def _make_own(folder: Path) -> None:
    """Makes a folder that this user alone writes to: /dev/shm is everybody's. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} is not yours alone to write to")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among processes that open or make the cache."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_index(folder: Path, header: bytes, size: int) -> io.FileIO:
    """The index with this header and size. In the place of another one, or of none, an empty one for empty data."""
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
    """Bytes that may still be written on the folder's file system."""
    system = os.statvfs(folder)
    return system.f_frsize * (system.f_bavail - SPARE * system.f_blocks)


def _pixels(data: bytes, max_pixels: int, white: int | None) -> bytes:
    """The image as upright RGB in PPM: a header and the pixels. Raises BadImage."""
    image = whole(data, max_pixels, white)
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()
