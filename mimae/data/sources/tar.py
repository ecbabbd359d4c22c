"""Members of a tar archive (ustar, GNU or pax), found in one pass over its headers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
LONGEST = 1 << 20
"""Largest size of a name or a label in bytes."""

FINE, CUT, DUPLICATE, OUTSIDE, LINK, DOTS, NO_END, DAMAGED, JOINED = range(9)
"""Flaws of a member, of the sample that it forms, or of the end of an archive."""

_LEAST_AHEAD, _MOST_AHEAD = 4096, 1 << 20
_LARGEST = (1 << 63) - 1
_DIGITS = 18
"""Largest number of digits of a decimal number, so that it fits into 63 bits."""
_PADDING = 1 << 20
"""Largest number of zero bytes with which archivers pad an archive. An archive without members has one record of _EMPTY
bytes. More zeros mean that a file system did not write the data."""
_EMPTY = 20 * BLOCK


class Member(NamedTuple):
    """A member of the archive. Links and devices have the flaw LINK."""

    name: bytes
    at: int
    size: int
    flaw: int


class End(NamedTuple):
    """The place where an archive ends unexpectedly, and why."""

    at: int
    flaw: int


class Reader:
    """Reader of small pieces at ascending offsets.

    It reads ahead, and further ahead if the offsets are close together. So it needs one read for many small members,
    and reads little of a large image to get its header.
    """

    def __init__(self, fd: int, end: int) -> None:
        self.fd, self.end = fd, end
        self._start, self._data, self._ahead = 0, b"", _LEAST_AHEAD

    def read(self, at: int, size: int) -> bytes:
        """Return `size` bytes from offset `at` on, or fewer at the end of the file. Raises OSError."""
        offset = at - self._start
        if offset < 0 or offset + size > len(self._data):
            near = offset <= len(self._data) + self._ahead
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if near else _LEAST_AHEAD
            self._start, self._data, offset = at, os.pread(self.fd, max(size, self._ahead), at), 0
        return self._data[offset : offset + size]


def members(reader: Reader) -> Iterator[Member | End]:
    """Yield the members of a ustar, GNU or pax archive, and finally an End if it does not end as it should."""
    at = 0
    name: bytes | None = None
    size: int | None = None
    while True:
        header = reader.read(at, BLOCK)
        if len(header) < BLOCK:
            yield End(min(at, reader.end), NO_END)
            return
        if not header.strip(b"\0"):
            if reader.read(at, min(reader.end - at, _PADDING)).strip(b"\0"):
                yield End(at, JOINED)
            elif reader.end - at > (_PADDING if at else _EMPTY):
                yield End(at, NO_END)
            return
        length = _number(header[124:136])
        if not intact(header) or length is None:
            yield End(at, DAMAGED)
            return
        kind, data = header[156:157], at + BLOCK
        if kind in b"LKxg" and length > LONGEST:
            yield End(at, DAMAGED)
            return
        if kind == b"L":
            name = reader.read(data, length).rstrip(b"\0")
        elif kind == b"x":
            records = _records(reader.read(data, length))
            name = records.get(b"path", name)
            told = records.get(b"size", b"")
            if told.isdigit() and len(told) > _DIGITS:
                yield End(at, DAMAGED)
                return
            size = int(told) if told.isdigit() else size
        elif kind not in b"Kg":
            regular = kind in b"07\0"
            # Links have no data, whatever size their header claims.
            length = 0 if kind in b"123456" else length if size is None else size
            cut = data + length > reader.end
            yield Member(name or _name(header), data, length, LINK if not regular else CUT if cut else FINE)
            if cut:
                yield End(reader.end, NO_END)
                return
            name = size = None
        at = data + -(-length // BLOCK) * BLOCK


def intact(header: bytes) -> bool:
    """Return whether the header's checksum is right; its own eight bytes count as spaces."""
    field = header[148:156]
    told = _number(field)
    # The lower half of Adler-32 is the sum of the bytes plus one, modulo 65521. It takes a tenth of the time of sum().
    return told is not None and zlib.adler32(header) & 0xFFFF == (told - 8 * 32 + sum(field) + 1) % 65521


def _number(field: bytes) -> int | None:
    """Parse a number of a header, below 2^63: octal digits or, if the first bit is set, base 256. None if invalid."""
    if field[0] & 0x80:
        number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return number if number <= _LARGEST else None
    digits = field.strip(b" \0") or b"0"
    return int(digits, 8) if not digits.strip(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU headers use the bytes of ustar's prefix for other fields.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(data: bytes) -> dict[bytes, bytes]:
    """Return the `length key=value` records of a pax header. Records after a damaged one are ignored."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > _DIGITS or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        data = data[int(length) :]
    return records
