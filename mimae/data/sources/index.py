"""The index of a source: the names of its samples in order, cached until the indexed files or folders change.

Names are stored as one block of bytes with int64 offsets. So ten million files do not need a Python object each, and
workers share the memory pages with the process that forked them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar
from zipfile import BadZipFile

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Share
from mimae.outside.text import printable

T = TypeVar("T")

_VERSION = 4
_SETTLED_NS = 2_000_000_000
_PLACE = "place."
STAMPS = "stamps"
"""Key of `places` for the modification times and sizes of the files."""
SCAN_THREADS = 16
"""Number of threads for file system calls: network file systems answer parallel requests as fast as a single one."""


@dataclass(frozen=True)
class Index:
    """The samples of a source in order, and the files and folders whose modification makes the index stale."""

    names: np.ndarray
    """uint8: paths relative to the source's folder, or member names inside its shards, concatenated."""
    offsets: np.ndarray
    """int64 (n + 1,): start of each name in `names`, and the end of the last one."""
    labels: np.ndarray | None
    classes: list[str] | None
    watched: list[bytes]
    """Paths that were read to make the index: every folder, the list file, or every shard."""
    places: dict[str, np.ndarray] = field(default_factory=dict)
    """Locations of the samples' bytes, in a form that depends on the kind of source; empty for separate files."""
    notes: list[str] = field(default_factory=list)
    """Lines about files that were left out or not understood."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def name(self, i: int) -> bytes:
        """Return the name of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self.names[self.offsets[i] : self.offsets[i + 1]].tobytes()


def cache_folder() -> Path:
    """Return the folder for indices and the embedded photographs: $XDG_CACHE_HOME/mimae or ~/.cache/mimae.

    Raises DataError for a user without a home folder, such as a user id in a container that /etc/passwd does not list.
    """
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.startswith("~"):
        raise DataError(
            f"there is no home folder for indices of data, {printable(base)}: set HOME or XDG_CACHE_HOME to a folder"
        )
    return Path(base) / "mimae"


def indexed(places: Sequence[Path], rules: str, build: Callable[[], Index]) -> Index:
    """Return the index of `places`, from the cache if no file or folder that it was made from has changed since.

    `rules` distinguishes the indices that different settings produce for the same places.
    """
    text = b"\0".join([*map(os.fsencode, places), b"%d" % _VERSION, rules.encode("utf-8", "surrogatepass")])
    key = hashlib.sha256(text).hexdigest()[:32]
    file = cache_folder() / "index" / f"{key}.npz"
    index = _load(file)
    if index is None:
        started = time.time_ns()
        index = build()
        _save(file, index, started)
    return index


def read_all(kind: str, files: Sequence[Path], read: Callable[[Path], T | str]) -> list[T]:
    """Return `read(file)` for each file, computed in parallel.

    A result of type str is the reason why a file cannot be used. Raises DataError that lists all such files.
    """
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = list(pool.map(read, files))
    if refused := [f"  {printable(f'{file}: {one}')}" for file, one in zip(files, found) if isinstance(one, str)]:
        listed = "\n".join(refused[:10])
        raise DataError(
            f"{len(refused)} of {len(files)} {kind} cannot be used:\n{listed}\n"
            f"Repair them, or leave them out of data.path."
        )
    return [one for one in found if not isinstance(one, str)]


def end_to_end(lengths: np.ndarray) -> np.ndarray:
    """Return the offsets of consecutive items of these lengths, int64 (n + 1,): each start, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


class IndexedSource:
    """Base class of sources that have an index. Subclasses add `path` and `read`."""

    RUN = 256
    """Number of samples in a block, for storage that has no blocks of its own."""

    def __init__(self, name: str, index: Index, max_bytes: int) -> None:
        self.name, self.index, self.max_bytes = name, index, max_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.index.notes)

    def check_size(self, size: int) -> None:
        """Raise OSError if an encoded image is larger than data.max_bytes."""
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than data.max_bytes = {self.max_bytes:,}")

    @property
    def labels(self) -> np.ndarray | None:
        return self.index.labels

    @property
    def classes(self) -> list[str] | None:
        return self.index.classes

    @property
    def blocks(self) -> np.ndarray:
        """int64 (m + 1,): first id of each block (run of samples stored together), and the number of samples."""
        return np.append(np.arange(0, len(self), self.RUN), len(self))

    @property
    def shares(self) -> tuple[Share, ...]:
        return (Share(len(self), len(self), self.blocks),)

    @cached_property
    def fingerprint(self) -> str:
        digest, index = hashlib.sha256(), self.index
        # A copy of the files has other modification times but is the same source.
        places = [block for key, block in sorted(index.places.items()) if key != STAMPS]
        for block in (index.names, index.offsets, index.labels, *places):
            if block is not None:
                digest.update(block.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.index)


def _stamps(watched: list[bytes]) -> np.ndarray:
    """Return each path's modification time in ns and, for files, size: int64 (n, 2). Raises OSError."""

    def stamp(path: bytes) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return np.array(list(pool.map(stamp, watched)), np.int64)


def _load(path: Path) -> Index | None:
    """Return the cached index, or None if there is none or it is stale."""
    try:
        with np.load(path, allow_pickle=False) as file:
            watched = bytes(file["watched"]).split(b"\0")
            if not np.array_equal(_stamps(watched), file["stamps"]):
                return None
            return Index(
                file["names"],
                file["offsets"],
                file.get("labels"),
                _texts(file, "classes"),
                watched,
                {key.removeprefix(_PLACE): file[key] for key in file if key.startswith(_PLACE)},
                _texts(file, "notes") or [],
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # Missing, damaged, or a folder is gone.
        return None


def _save(path: Path, index: Index, started_ns: int) -> None:
    """Write the index to the cache. Errors are ignored: a run does not need the cache."""
    blocks = {"names": index.names, "offsets": index.offsets, "watched": _bytes(b"\0".join(index.watched))}
    blocks |= {_PLACE + key: block for key, block in index.places.items()}
    if index.labels is not None:
        blocks["labels"] = index.labels
    for key, texts in (("classes", index.classes), ("notes", index.notes or None)):
        if texts is not None:
            blocks[key] = _bytes("\0".join(texts).encode("utf-8", "surrogatepass"))
    with suppress(OSError):
        stamps = _stamps(index.watched)
        # A folder that changed this recently may change again within the resolution of its modification time.
        if stamps[:, 0].max() > started_ns - _SETTLED_NS:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, allow_pickle=False, stamps=stamps, **blocks)
                file.flush()
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)


def _bytes(block: bytes) -> np.ndarray:
    return np.frombuffer(block, np.uint8)


def _texts(file: Mapping[str, np.ndarray], key: str) -> list[str] | None:
    return bytes(file[key]).decode("utf-8", "surrogatepass").split("\0") if key in file else None
