"""Patterns of shards: {000..127} counts, {a,b} lists, and * ? [...] match existing files."""

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
"""Extensions of files that contain many samples."""

MOST_FILES = 1_000_000
"""Largest number of files that a pattern may name."""

_MOST_BRACES = 16
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def shards_in(folder: Path, version: int) -> list[Path]:
    """Return the shards directly in a folder, in byte order of their names.

    In version 1 there are none if the folder also contains images or folders.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith("."):
                    continue
                if version == 1 and (is_image(os.fsencode(name), version) or _is_folder(entry)):
                    return []
                # Opening a pipe would wait for a writer.
                if name.endswith(SHARDS) and not _is_folder(entry) and (entry.is_symlink() or entry.is_file()):
                    found.append(folder / entry.name)
    except OSError:
        return []  # A folder that cannot be listed is reported by the scan for images.
    return sorted(found, key=os.fsencode)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def is_pattern(path: str) -> bool:
    """Return whether the path, which does not exist literally, may name several files."""
    return bool(_BRACES.search(path)) or glob.has_magic(path)


def matching(given: str, folder: Path) -> list[Path]:
    """Return the files that a pattern, relative to `folder`, names. Raises DataError.

    The name of `folder` is taken literally. Braces expand in their order, and matches are sorted by bytes.
    """
    pattern = printable(os.path.join(folder, given))
    if given.count("{") > _MOST_BRACES:
        raise DataError(f"{pattern} has more than {_MOST_BRACES} braces, which name too many files")
    files: dict[str, None] = {}
    for choice in _expand(given):
        if len(files) > MOST_FILES:
            raise DataError(f"{pattern} names more than {MOST_FILES:,} files; use larger files, or a folder")
        path = os.path.join(folder, choice)
        found = [path]
        if glob.has_magic(choice):
            matched = glob.iglob(os.path.join(glob.escape(str(folder)), choice))
            found = sorted(islice(matched, MOST_FILES + 1), key=os.fsencode)
        if not found:
            raise DataError(f"{pattern}: nothing matches {printable(path)}")
        for name in found:
            if not os.path.isfile(name):
                raise DataError(f"{pattern}: {printable(name)} does not exist, or is not a file")
            if name in files:
                raise DataError(f"{pattern} names {printable(name)} twice")
            files[name] = None
    return list(map(Path, files))


def _expand(pattern: str) -> Iterator[str]:
    """Yield the pattern for every choice in its braces, expanded from left to right."""
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
    """Yield the numbers from `first` to `last`, padded to the width of `first`. There may be many: this is lazy."""
    return (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
