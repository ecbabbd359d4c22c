"""Which files a pattern of shards names: {000..127} counts, {a,b} lists, and * ? [...] match what is there."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mimae.data.loading.batch import DataError
from mimae.data.sources.endings import is_image
from mimae.outside.text import printable

SHARDS = (".tar", ".parquet")
"""Endings of files that hold many samples."""

MOST_FILES = 1_000_000
"""Files that a pattern names at most."""

_MOST_BRACES = 16
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def shards_in(folder: Path, version: int) -> list[Path]:
    """Return the shards right in a folder, by the bytes of their names; by the first rules none where images or other
    folders lie beside them."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith("."):
                    continue
                if version == 1 and (is_image(os.fsencode(name), version) or _is_folder(entry)):
                    return []
                # Opening a pipe would wait for who writes into it.
                if name.endswith(SHARDS) and not _is_folder(entry) and (entry.is_symlink() or entry.is_file()):
                    found.append(folder / entry.name)
    except OSError:
        return []  # What cannot be listed is told of where the folder's images are looked for.
    return sorted(found, key=os.fsencode)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def is_pattern(path: str) -> bool:
    """Whether the path, which does not exist as it stands, may name several files."""
    return bool(_BRACES.search(path)) or glob.has_magic(path)


def matching(given: str, folder: Path) -> list[Path]:
    """The files that a pattern names, relative to `folder`, whose own name stands for itself: braces in their order,
    what matches sorted by bytes. Raises DataError."""
    pattern = printable(os.path.join(folder, given))
    if given.count("{") > _MOST_BRACES:
        raise DataError(f"{pattern} has more than {_MOST_BRACES} braces, which name too many files")
    files: dict[str, None] = {}
    for choice in _expand(given):
        if len(files) > MOST_FILES:
            raise DataError(f"{pattern} names more than {MOST_FILES:,} files; give larger ones, or a folder")
        path = os.path.join(folder, choice)
        found = [path]
        if glob.has_magic(choice):
            matched = glob.iglob(os.path.join(glob.escape(str(folder)), choice))
            found = sorted(islice(matched, MOST_FILES + 1), key=os.fsencode)
        if not found:
            raise DataError(f"{pattern}: nothing matches {printable(path)}")
        for name in found:
            if not os.path.isfile(name):
                raise DataError(f"{pattern}: {printable(name)} does not exist, or is no file")
            if name in files:
                raise DataError(f"{pattern} names {printable(name)} twice")
            files[name] = None
    return list(map(Path, files))


def _expand(pattern: str) -> Iterator[str]:
    """The pattern once for every choice in its braces, from left to right."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    if listed is None and int(first) > int(last):
        raise DataError(f"{printable(pattern)} counts backwards: {{first..last}} goes up")
    choices = listed.split(",") if listed is not None else _count(first, last)
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :])


def _count(first: str, last: str) -> Iterator[str]:
    """The numbers from `first` to `last`, as wide as the first is written, one after the other: there may be many."""
    return (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
