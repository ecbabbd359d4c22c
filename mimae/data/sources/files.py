"""Sources whose images are separate files, and the scan of a folder for images."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.sources.endings import ENDINGS, counted, ending_of, is_image, left_out, listed
from mimae.data.sources.index import SCAN_THREADS, Index, IndexedSource, end_to_end
from mimae.data.sources.patterns import SHARDS
from mimae.data.sources.splits import by_split
from mimae.outside.reading import open_regular
from mimae.outside.text import printable


class FileSource(IndexedSource):
    """Images that are separate files: of a folder, in byte order of their paths, or of a list, in its order."""

    def __init__(self, name: str, folder: Path, index: Index, max_bytes: int) -> None:
        super().__init__(name, index, max_bytes)
        self._folder = os.fsencode(folder)

    def path(self, i: int) -> str:
        return os.fsdecode(os.path.join(self._folder, self.index.name(i)))

    def read(self, i: int) -> bytes:
        with open(open_regular(os.path.join(self._folder, self.index.name(i))), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.check_size(size)
            # Python allocates the requested number of bytes, so the maximum is only requested if the file is longer.
            data = file.read(size)
            if len(data) == size and (more := file.read(1)):  # Files can grow, and those in /proc report size 0.
                data += more + file.read(self.max_bytes - size)
                self.check_size(len(data))
            return data


def scan_folder(root: Path, version: int) -> Index:
    """Index every image below `root`. Folders are listed in parallel, each of them once. Raises DataError."""
    listings = _list_folders(os.fsencode(root), version)
    names, lengths, per_class, folders = bytearray(), array("q"), dict[bytes, int](), dict[bytes, None]()
    for prefix, run in _walk({prefix: listing.entries for prefix, listing in listings.items()}):
        found = [prefix + name for name in run]
        names += b"".join(found)
        lengths.extend(map(len, found))
        folders[prefix] = None
        label = prefix.partition(b"/")[0]
        per_class[label] = per_class.get(label, 0) + len(found)
    others = sum((listing.others for listing in listings.values()), Counter[str]())
    if not lengths:
        raise DataError(_no_images(root, listings, others, version))
    if version > 1:
        _refuse_shards(root, len(lengths), listings)
    labels, classes, notes = None, None, left_out(others)
    # Images outside of the class folders have no class, and then no image gets one.
    if b"" not in per_class:
        folders_in_order = sorted(per_class)
        number = {name: i for i, name in enumerate(folders_in_order)}
        labels = np.repeat(np.array([number[name] for name in per_class]), list(per_class.values())).astype(np.int64)
        classes = [os.fsdecode(name) for name in folders_in_order]
    elif len(per_class) > 1:
        beside = per_class[b""]
        images = "images are" if beside > 1 else "image is"
        notes.append(f"no sample has a class, since {beside:,} {images} next to the folders that would be classes")
    if pooled := _splits_in(folders):
        notes.append(
            f"folders that are called like splits of one data set are all used: {listed(map(os.fsdecode, pooled))}; if "
            f"only one is meant, name it, as {printable(os.path.join(root, os.fsdecode(pooled[0])))}"
        )
    if again := sum(listing.again for listing in listings.values()):
        notes.append(
            f"left out: {again:,} link{'s' if again > 1 else ''} to folders that were already reached by another link"
        )
    watched = [os.path.join(os.fsencode(root), folder) for folder in listings]
    return Index(
        np.frombuffer(bytes(names), np.uint8),
        end_to_end(np.array(lengths)),
        labels,
        classes,
        watched,
        notes=notes if version > 1 else [],
    )


def _splits_in(folders: Iterable[bytes]) -> list[bytes]:
    """Return the folders that are called like several splits and are next to each other, among folders with images."""
    inside: dict[bytes, dict[str, None]] = {}
    for folder in folders:
        while folder:
            parent, _, name = folder.removesuffix(b"/").rpartition(b"/")
            folder = parent + b"/" if parent else b""
            names = inside.setdefault(folder, {})
            if os.fsdecode(name) in names:  # Then its parents are known too.
                break
            names[os.fsdecode(name)] = None
    groups = ((parent, by_split(list(names))) for parent, names in inside.items())
    return [
        parent + os.fsencode(name)
        for parent, group in groups
        for split, names in group.items()
        for name in names
        if split is not None
    ]


def _no_images(root: Path, listings: dict[bytes, _Listing], others: Counter[str], version: int) -> str:
    """Return an error message for a folder without images: what it contains, and which path would work instead."""
    folders = f"{len(listings)} folder{'s' if len(listings) > 1 else ''}"
    text = (
        f"{printable(str(root))} contains no images: {folders} searched, hidden ones left out. "
        f"Extensions of images are {', '.join(ENDINGS[version])}; tar shards and Parquet files need a separate folder."
    )
    if others:
        text += f" It contains files of other kinds: {counted(others)}."
    if shards := [os.path.join(os.fsencode(root), prefix) for prefix, each in listings.items() if each.shards]:
        text += f" There are shards in {listed(map(os.fsdecode, shards))}; name that folder."
    if others[""]:
        text += " For images without an extension, write a list file with one path per line."
    if others["gz"] or others["tgz"] or others["zst"]:
        text += " Compressed shards do not allow random access: unpack them to .tar."
    return text


def beside_shards(root: Path, version: int) -> list[str]:
    """Return notes about the other files in a folder of shards. Raises DataError if there are images among them."""
    listings = _list_folders(os.fsencode(root), version)
    images = sum(len(run) for _, run in _walk({prefix: listing.entries for prefix, listing in listings.items()}))
    _refuse_shards(root, images, listings)
    others = Counter(listings[b""].others)
    for ending in SHARDS:
        others.pop(ending[1:], None)
    notes = left_out(others)
    below = [prefix + name for prefix, each in listings.items() if prefix for name in each.shards]
    if below:
        folders = ["*"] * below[0].count(b"/")
        pattern = os.path.join(root, *folders, "*" + os.path.splitext(os.fsdecode(below[0]))[1])
        notes.append(
            f"left out: {len(below):,} shard{'s' if len(below) > 1 else ''} in folders below, "
            f"{listed(map(os.fsdecode, below))}; a mixture or a pattern, such as {printable(pattern)}, names them"
        )
    return notes


def _refuse_shards(root: Path, images: int, listings: dict[bytes, _Listing]) -> None:
    """Raise DataError if a folder contains both shards and images, because it is unclear which of them are meant."""
    found = [(prefix, name) for prefix, listing in listings.items() for name in listing.shards]
    if not found or not images:
        return
    prefix, name = found[0]
    ending = os.path.splitext(name)[1]
    pattern = os.path.join(os.fsdecode(os.path.join(os.fsencode(root), prefix)), "*" + os.fsdecode(ending))
    picture = next(
        os.fsdecode(prefix + entry.split(b"\0")[0])
        for prefix, listing in listings.items()
        for entry in listing.entries
        if not entry.endswith(b"/")
    )
    raise DataError(
        f"{printable(str(root))} contains {len(found):,} shard{'s' if len(found) > 1 else ''} "
        f"({listed(os.fsdecode(p + n) for p, n in found)}) and {images:,} image{'s' if images > 1 else ''} "
        f"({printable(picture)}{', ...' if images > 1 else ''}), and only one kind can be meant: "
        f"write {printable(pattern)} for the shards, or move them elsewhere for the images"
    )


class _Listing(NamedTuple):
    """The content of one folder, without its subfolders' content."""

    entries: list[bytes]
    """Entries in byte order of the paths: `name/` for a folder, names joined by NUL for a run of images."""
    links: frozenset[bytes]
    """The folders among the entries that are links."""
    others: Counter[str]
    """Number of files that are not images, by extension."""
    shards: list[bytes]
    """Names of tar shards and Parquet files, which `others` counts too."""
    again: int = 0
    """Number of links that were not followed."""


def _list_folders(root: bytes, version: int) -> dict[bytes, _Listing]:
    """List `root` and every folder below it. The keys are paths relative to `root` ("" or "a/b/").

    A link to one of its parent folders is not followed. From version 2 on, each folder is entered through at most one
    link, so that the scan ends when folders link to one another.
    """
    listings: dict[bytes, _Listing] = {}
    entered: set[tuple[int, int]] = set()
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        level: list[tuple[bytes, frozenset[tuple[int, int]], bool]] = [(b"", frozenset(), False)]
        while level:
            identities = list(pool.map(lambda at: _identity(root, at[0]), level))
            chosen, below = [], []
            for (prefix, above, is_link), identity in zip(level, identities):
                if identity in above:
                    continue
                if is_link and version > 1:
                    if identity in entered:
                        parent = prefix[:-1].rpartition(b"/")[0]
                        parent += b"/" if parent else b""
                        listings[parent] = listings[parent]._replace(again=listings[parent].again + 1)
                        continue
                    entered.add(identity)
                chosen.append((prefix, above | {identity}))
            for (prefix, above), listing in zip(chosen, pool.map(lambda at: _list(root, at[0], version), chosen)):
                listings[prefix] = listing
                folders = (entry for entry in listing.entries if entry.endswith(b"/"))
                below += [(prefix + entry, above, entry in listing.links) for entry in folders]
            level = below
    return listings


def _identity(root: bytes, prefix: bytes) -> tuple[int, int]:
    folder = os.path.join(root, prefix)
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _cannot_list(folder, error) from error
    return status.st_dev, status.st_ino


def _cannot_list(folder: bytes, error: OSError) -> DataError:
    return DataError(f"cannot list the folder {printable(os.fsdecode(folder))}: {error.strerror}")


def _list(root: bytes, prefix: bytes, version: int) -> _Listing:
    """List one folder."""
    folder = os.path.join(root, prefix)
    found, links, others, shards = [], set(), Counter[str](), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if _is_folder(entry):
                    found.append(name + b"/")
                    if entry.is_symlink():
                        links.add(name + b"/")
                elif not (entry.is_symlink() or entry.is_file()):
                    continue  # A pipe or a device.
                elif is_image(name, version):
                    found.append(name)
                else:
                    others[ending_of(name)] += 1
                    if name.lower().endswith(_SHARDS):
                        shards.append(name)
    except OSError as error:
        raise _cannot_list(folder, error) from error
    listing: list[bytes] = []
    for is_folder, group in groupby(sorted(found), key=lambda name: name.endswith(b"/")):
        run = list(group)
        listing += run if is_folder else [b"\0".join(run)]
    return _Listing(listing, frozenset(links), others, sorted(shards))


_SHARDS = tuple(ending.encode() for ending in SHARDS)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself. With the extension of an image it becomes a bad sample.
        return False


def _walk(listings: dict[bytes, list[bytes]]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yield runs of images with their folder, in byte order of the full paths."""
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
