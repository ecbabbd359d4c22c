"""List files: one path per line and, after a tab (in .csv a comma), its class as a number or a name."""

from __future__ import annotations

import csv
import io
import os
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.sources.endings import is_image
from mimae.data.sources.index import Index, end_to_end
from mimae.outside.reading import UTF_16, open_regular
from mimae.outside.text import printable

EXTENSIONS = (".txt", ".tsv", ".csv")

_LONGEST_LINE = 1 << 16
_LOOKED_FOR = 100
"""Number of paths at the start of a list, of which at least one has to exist."""

_SEPARATORS = ((" ", "a space"), (";", "a semicolon"), ("\t", "a tab"), (",", "a comma"), ("|", "a bar"))


def read_list(path: Path) -> Index:
    """Index the images that a list names, by paths relative to its folder. Raises DataError."""
    comma = path.suffix.lower() == ".csv"
    names, lengths, labels = bytearray(), array("q"), _Labels()
    try:
        for number, row in _rows(path, comma):
            where = f"{printable(str(path))}, line {number}"
            if len(row) > 2 or not row[0] or "\0" in row[0]:
                raise DataError(_no_path(row, where, comma))
            name = os.fsencode(row[0])
            names += name
            lengths.append(len(name))
            labels.add(row[1] if len(row) == 2 else None, where)
    except (csv.Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot read the list {printable(str(path))}: {reason}") from error
    if not lengths:
        raise DataError(f"{printable(str(path))} names no image; a list has one path per line, relative to its folder")
    index = Index(
        np.frombuffer(bytes(names), np.uint8), end_to_end(np.array(lengths)), *labels.numbered(), [os.fsencode(path)]
    )
    _check_paths(path, index, comma)
    return index


def _rows(path: Path, comma: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line that is not empty. Raises OSError, csv.Error."""
    with open(open_regular(path), "rb") as binary:
        if binary.read(2) in UTF_16:
            raise OSError(None, "it is written in UTF-16; save it as UTF-8")
        binary.seek(0)
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")

        def lines() -> Iterator[str]:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise csv.Error(f"a line has more than {_LONGEST_LINE:,} characters; is this a list?")
                yield line

        rows = csv.reader(
            lines(), delimiter="," if comma else "\t", quoting=csv.QUOTE_MINIMAL if comma else csv.QUOTE_NONE
        )
        for row in rows:
            if row and row != [""]:
                yield rows.line_num, row


def _no_path(row: list[str], where: str, comma: bool) -> str:
    zero = " (a zero byte, as in UTF-16: save the list as UTF-8)" if any("\0" in field for field in row) else ""
    return (
        f"{where}: {[field[:80] for field in row[:4]]!r} is not a path, optionally followed by a class after a "
        f"{'comma' if comma else 'tab'}{zero}"
    )


class _Labels:
    """Collects the classes of a list: numbers on all lines, names on all lines, or no classes."""

    def __init__(self) -> None:
        self._codes, self._known = array("q"), dict[str, int]()
        self._bare, self._is_number = 0, False

    def add(self, text: str | None, where: str) -> None:
        """Add the label of the next line. Raises DataError if its kind differs from that of the lines before."""
        self._bare += text is None
        if self._bare and (self._codes or text is not None):
            raise DataError(f"{where}: some lines have a class and others do not")
        if text is None:
            return
        code = self._known.get(text)
        if code is None:
            is_number = _is_number(text, where)
            if self._known and is_number != self._is_number:
                raise DataError(
                    f"{where}: {text!r} is a class {'number' if is_number else 'name'} and other lines have "
                    f"{'names' if is_number else 'numbers'} (remove a heading in the first line)"
                )
            self._is_number = is_number
            code = self._known[text] = len(self._known)
        self._codes.append(code)

    def numbered(self) -> tuple[np.ndarray | None, list[str] | None]:
        """Return the classes, int64 (n,), and their names in alphabetical order, or None if they have no names."""
        if not self._codes:
            return None, None
        names = None if self._is_number else sorted(self._known)
        rank = (
            {text: int(text.strip()) for text in self._known}
            if names is None
            else {name: i for i, name in enumerate(names)}
        )
        return np.array([rank[text] for text in self._known], np.int64)[np.array(self._codes)], names


def _is_number(text: str, where: str) -> bool:
    """Return whether a label is a class number; otherwise it is a name. Raises DataError for other numbers."""
    if text.isascii() and text.strip().isdigit():
        if len(text.strip()) < 11 and int(text.strip()) < 1 << 31:
            return True
    else:
        try:
            float(text)
        except ValueError:
            if text.strip():
                return False
    raise DataError(f"{where}: {text[:80]!r} is not a class number, an integer from 0 on")


def _check_paths(path: Path, index: Index, comma: bool) -> None:
    """Raise DataError if the list seems to have another format than the one it was read in."""
    first = [os.fsdecode(index.name(i)) for i in range(min(len(index), _LOOKED_FOR))]
    exists = [_exists(path.parent, name) for name in first]
    if not any(exists):
        raise DataError(
            f"{printable(str(path))}: none of its first {len(first)} paths exists, the first being "
            f"{printable(os.path.join(path.parent, first[0]))}; {_advice(path, first[0], comma)}"
        )
    heading = next(pairwise(exists), None) == (False, True) and not is_image(index.name(0))
    if heading and not os.path.splitext(first[0])[1]:
        raise DataError(
            f"{printable(str(path))}, line 1: {first[0]!r} looks like a heading: no such file exists, and the next "
            f"line's does; leave the heading out"
        )


def _advice(path: Path, name: str, comma: bool) -> str:
    """Return advice on how to write the line so that it means what was probably intended."""
    if "://" in name or name.startswith("pipe:"):
        return "it is a URL, but images are read from local files: download them, or mount their storage"
    rule = "in .csv a class follows after a comma, in .txt and .tsv after a tab"
    seen = [(separator, word) for separator, word in _SEPARATORS if separator in name]
    for separator, word in seen:
        if _exists(path.parent, name.rpartition(separator)[0]) or _exists(path.parent, name.partition(separator)[0]):
            right = "a comma" if comma else "a tab"
            return f"{word} was seen where {right} has to be: {rule}"
    words = f" ({' and '.join(word for _, word in seen)} was seen, which belongs to the path)" if seen else ""
    return f"paths are relative to the list's folder, and {rule}{words}"


def _exists(folder: Path, name: str) -> bool:
    try:
        return os.path.exists(os.path.join(folder, name))
    except ValueError:
        return False
