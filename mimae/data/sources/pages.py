"""Claims of a Parquet file about its columns and their pages, read before a reader makes room for it.

Footers and the headers of pages are structs in thrift's compact protocol. pyarrow ends the process where a column's
description in the footer is wrong, so the few numbers that are needed of it are read here.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_HEADER = 1 << 16
"""Bytes of a page's header that are looked at; statistics of long values make them long."""

Struct = dict[int, Any]
"""The fields of a struct by number: integers, bytes, structs and lists; others are None."""


class Chunk(NamedTuple):
    """A column in a row group."""

    start: int
    """Offset of its first page."""
    packed: int
    """Bytes in the file."""
    unpacked: int


def read_chunks(footer: bytes) -> list[dict[str, Chunk]]:
    """Return the columns of each row group by dotted name. Raises OSError where that is no footer."""
    try:
        _, fields = _struct(footer, 0)
        return [dict(map(_chunk, group[1])) for group in fields[4]]
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError("its footer does not describe columns") from error


def _chunk(column: Struct) -> tuple[str, Chunk]:
    facts = column[3]
    name = b".".join(facts[3]).decode("utf-8", "surrogateescape")
    start, packed, unpacked = facts[9], facts[7], facts[6]
    if not all(isinstance(number, int) for number in (start, packed, unpacked)):
        raise KeyError(name)
    return name, Chunk(min(start, facts.get(11) or start), packed, unpacked)


def unpacked_size(descriptor: int, start: int, length: int) -> int:
    """Return the bytes that the pages in `length` bytes from `start` on claim to unpack to.

    Raises OSError where what is there are no pages, or where they do not fit.
    """
    total, at, end = 0, start, start + length
    while at < end:
        header = os.pread(descriptor, min(_HEADER, end - at), at)
        try:
            size, fields = _struct(header, 0)
            unpacked, packed = fields[2], fields[3]
            is_page = unpacked >= 0 and packed >= 0
        except (IndexError, KeyError, TypeError, RecursionError) as error:
            raise OSError(f"there is no page at byte {at:,}") from error
        if not is_page or at + size + packed > end:
            raise OSError(f"the page at byte {at:,} claims {unpacked:,} bytes in {packed:,}")
        total += unpacked
        at += size + packed
    return total


def _struct(data: bytes, at: int) -> tuple[int, Struct]:
    """Return where a struct ends, and its fields. Raises IndexError past the end of the data, KeyError."""
    number, fields = 0, Struct()
    while kind := data[at] & 0x0F:
        step, at = data[at] >> 4, at + 1
        if step:
            number += step
        else:
            at, number = _integer(data, at)
        if kind in (_TRUE, _FALSE):  # The value is in the kind.
            fields[number] = None
        else:
            at, fields[number] = _value(data, at, kind)
    return at + 1, fields


def _value(data: bytes, at: int, kind: int) -> tuple[int, Any]:
    """Return where a value of this kind ends, and the value."""
    if kind in _INTEGERS:
        return _integer(data, at)
    if kind == _BINARY:
        at, length = _varint(data, at)
        if at + length > len(data):
            raise IndexError(length)
        return at + length, data[at : at + length]
    if kind == _STRUCT:
        return _struct(data, at)
    if kind in (_LIST, _SET):
        count, inner, at = data[at] >> 4, data[at] & 0x0F, at + 1
        if count == 15:
            at, count = _varint(data, at)
        if count > len(data) - at:  # Each item has a byte at least.
            raise IndexError(count)
        items = []
        for _ in range(count):
            at, item = _value(data, at, inner)
            items.append(item)
        return at, items
    if kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
        return at + (8 if kind == _DOUBLE else 1), None
    raise KeyError(kind)  # Maps come neither in a footer nor in a page's header.


def _integer(data: bytes, at: int) -> tuple[int, int]:
    at, value = _varint(data, at)
    return at, (value >> 1) ^ -(value & 1)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return at, value
        shift += 7
        if shift > 63:
            raise KeyError(shift)
