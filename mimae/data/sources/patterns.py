"""Which files a pattern of shards names: {000..127} counts, {a,b} lists, and * ? [...] match what is there."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import EXTENSIONS

SHARDS = (".tar", ".parquet")
"""Endings of files that hold many samples."""

_IMAGES = tuple(f".{extension}" for extension in EXTENSIONS)
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def shard_files(folder: Path) -> list[Path]:
    """The shards right in a folder, by the bytes of their names; none where images or other folders lie beside them."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith("."):
                    continue
                if name.endswith(_IMAGES) or _is_folder(entry):
                    return []
                # Opening a pipe would wait for who writes into it.
                if name.endswith(SHARDS) and (entry.is_symlink() or entry.is_file()):
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
    pattern = os.path.join(folder, given)
    files: dict[str, None] = {}
    for choice in _expand(given):
        path = os.path.join(folder, choice)
        found = [path]
        if glob.has_magic(choice):
            found = sorted(glob.glob(os.path.join(glob.escape(str(folder)), choice)), key=os.fsencode)
        if not found:
            raise DataError(f"{pattern}: nothing matches {path}")
        for name in found:
            if not os.path.isfile(name):
                raise DataError(f"{pattern}: {name} does not exist, or is no file")
            if name in files:
                raise DataError(f"{pattern} names {name} twice")
            files[name] = None
    if not files:
        raise DataError(f"{pattern} counts backwards: {{first..last}} goes up")
    return list(map(Path, files))


def _expand(pattern: str) -> Iterator[str]:
    """The pattern once for every choice in its braces, from left to right."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    choices = listed.split(",") if listed is not None else _count(first, last)
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :])


def _count(first: str, last: str) -> list[str]:
    """The numbers from `first` to `last`, as wide as the first is written."""
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
