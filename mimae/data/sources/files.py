"""Images in files of their own, found in a folder or named by a list."""

from __future__ import annotations

import csv
import os
import stat
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import EXTENSIONS
from mimae.data.sources.index import SCAN_THREADS, Index, IndexedSource, end_to_end

LIST_EXTENSIONS = (".txt", ".tsv", ".csv")
_EXTENSIONS = frozenset(extension.encode() for extension in EXTENSIONS)


class FileSource(IndexedSource):
    """Images in files of their own: a folder's in the order of their paths' bytes, a list's in its own."""

    def __init__(self, name: str, folder: Path, index: Index) -> None:
        super().__init__(name, index)
        self._folder = os.fsencode(folder)

    def path(self, i: int) -> str:
        return os.fsdecode(os.path.join(self._folder, self.index.name(i)))

    def read(self, i: int) -> bytes:
        with open(os.path.join(self._folder, self.index.name(i)), "rb", opener=_open_regular) as file:
            return file.read()


def _open_regular(path: str, flags: int) -> int:
    """Opens a file, but no pipe or device, which might never end or never answer."""
    opened = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError("it is not a regular file")
    return opened


# Folders


def scan_folder(root: Path) -> Index:
    """Indexes every image below `root`, one listing per folder, many at a time."""
    listings = _list_folders(os.fsencode(root))
    names, lengths, per_class = bytearray(), array("q"), dict[bytes, int]()
    for prefix, run in _walk(listings):
        found = [prefix + name for name in run]
        names += b"".join(found)
        lengths.extend(map(len, found))
        label = prefix.partition(b"/")[0]
        per_class[label] = per_class.get(label, 0) + len(found)
    if not lengths:
        folders = f"{len(listings)} folder{'s' if len(listings) > 1 else ''}"
        raise DataError(
            f"{root} holds no images: {folders} looked through, hidden ones left out. "
            f"Images end in {', '.join(EXTENSIONS)}; tar shards and Parquet files lie in a folder of their own."
        )
    labels = classes = None
    # Images beside the class folders have no class, and half a labelling is none.
    if b"" not in per_class:
        folders_in_order = sorted(per_class)
        number = {name: i for i, name in enumerate(folders_in_order)}
        labels = np.repeat(np.array([number[name] for name in per_class]), list(per_class.values())).astype(np.int64)
        classes = [os.fsdecode(name) for name in folders_in_order]
    watched = [os.path.join(os.fsencode(root), folder) for folder in listings]
    return Index(np.frombuffer(bytes(names), np.uint8), end_to_end(np.array(lengths)), labels, classes, watched)


_Listing = list[bytes]
"""A folder's entries in the order of paths' bytes: `name/` for a folder, names joined by NUL for images."""


def _list_folders(root: bytes) -> dict[bytes, _Listing]:
    """The listing of `root` and of every folder below it, by path relative to `root` ("" or "a/b/")."""
    listings: dict[bytes, _Listing] = {}
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        level: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
        while level:
            below = []
            for (prefix, above), result in zip(level, pool.map(lambda at: _list(root, *at), level), strict=True):
                if result is not None:
                    identity, listings[prefix] = result
                    inside = above | {identity}
                    below += [(prefix + entry, inside) for entry in listings[prefix] if entry.endswith(b"/")]
            level = below
    return listings


def _list(root: bytes, prefix: bytes, above: frozenset[tuple[int, int]]) -> tuple[tuple[int, int], _Listing] | None:
    """Lists one folder; None where it is one of those above it again, reached through a link."""
    folder = os.path.join(root, prefix)
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return None
        with os.scandir(folder) as entries:
            found = sorted(name for name in map(_entry, entries) if name is not None)
    except OSError as error:
        raise DataError(f"cannot list the folder {os.fsdecode(folder)}: {error.strerror}") from error
    listing: _Listing = []
    for is_folder, group in groupby(found, key=lambda name: name.endswith(b"/")):
        run = list(group)
        listing += run if is_folder else [b"\0".join(run)]
    return identity, listing


def _entry(entry: os.DirEntry[bytes]) -> bytes | None:
    """The entry's name where it is an image, `name/` where it is a folder, None where it is neither."""
    name = entry.name
    if name.startswith(b"."):
        return None
    try:
        if entry.is_dir():
            return name + b"/"
    except OSError:  # A link to itself; as an image it will be listed as a bad sample.
        pass
    _, dot, extension = name.rpartition(b".")
    is_image = dot and extension.lower() in _EXTENSIONS
    return name if is_image and (entry.is_symlink() or entry.is_file()) else None


def _walk(listings: dict[bytes, _Listing]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Runs of images with their folder, in the order of the whole paths' bytes."""
    stack = [(b"", iter(listings[b""]))]
    while stack:
        prefix, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
        elif not entry.endswith(b"/"):
            yield prefix, entry.split(b"\0")
        elif prefix + entry in listings:
            stack.append((prefix + entry, iter(listings[prefix + entry])))


# Lists


def read_list(path: Path) -> Index:
    """Reads a list file: per line a path relative to its folder, then (tab, in .csv comma) a class number."""
    comma = path.suffix.lower() == ".csv"
    names, lengths, labels, unlabelled = bytearray(), array("q"), array("q"), 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(
                file,
                delimiter="," if comma else "\t",
                quoting=csv.QUOTE_MINIMAL if comma else csv.QUOTE_NONE,
            )
            for row in rows:
                if not row or row == [""]:
                    continue
                where = f"{path}, line {rows.line_num}"
                if len(row) > 2 or not row[0] or "\0" in row[0]:
                    raise DataError(
                        f"{where}: {row!r} is not a path, alone or with a class number after a "
                        f"{'comma' if comma else 'tab'}"
                    )
                name = os.fsencode(row[0])
                names += name
                lengths.append(len(name))
                if len(row) == 1:
                    unlabelled += 1
                else:
                    labels.append(_class_number(row[1], where))
                if unlabelled and labels:
                    raise DataError(f"{where}: class numbers stand on some lines and not on others")
    except (csv.Error, OSError) as error:
        raise DataError(f"cannot read the list {path}: {error}") from error
    if not lengths:
        raise DataError(f"{path} names no image; a list has one path per line, relative to {path.parent}")
    index = Index(
        np.frombuffer(bytes(names), np.uint8),
        end_to_end(np.array(lengths)),
        np.array(labels, np.int64) if labels else None,
        None,
        [os.fsencode(path)],
    )
    first = [os.path.join(path.parent, os.fsdecode(index.name(i))) for i in range(min(len(index), 100))]
    if not any(map(os.path.exists, first)):
        raise DataError(
            f"{path}: none of its first {len(first)} paths exists, the first being {first[0]}; "
            f"paths are relative to the list's folder"
        )
    return index


def _class_number(text: str, where: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 31:
        raise DataError(f"{where}: {text!r} is not a class number, an integer from 0 on")
    return number
