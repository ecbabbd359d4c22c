"""Claims of a Parquet file about its columns and their pages, read before a reader makes room for it.

Footers and the headers of pages are structs in thrift's compact protocol. pyarrow ends the process where a column's
description in the footer is wrong, so the few numbers that are needed of it are read here.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from mimae.data.sources.thrift import BINARY, INTEGERS, LIST, SET, STRUCT, Field, read_struct

_HEADER = 1 << 16
"""Bytes of a page's header that are looked at; statistics of long values make them long."""

_WRONG = (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""Errors of a look at fields that are not there, or of another kind."""


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
        _, fields = read_struct(footer)
        _, groups = _by_number(fields)[4]
        return [dict(map(_chunk, _by_number(group)[1][1])) for group in groups]
    except _WRONG as error:
        raise OSError("its footer does not describe columns") from error


def _chunk(column: list[Field]) -> tuple[str, Chunk]:
    facts = _by_number(_by_number(column)[3])
    name = b".".join(facts[3][1]).decode("utf-8", "surrogateescape")
    start, packed, unpacked = facts[9], facts[7], facts[6]
    if not all(isinstance(number, int) for number in (start, packed, unpacked)):
        raise KeyError(name)
    return name, Chunk(min(start, facts.get(11) or start), packed, unpacked)


def _by_number(fields: list[Field]) -> dict[int, Any]:
    """Return the values of the kinds that matter here; those of other kinds are None."""
    kinds = (*INTEGERS, BINARY, LIST, SET, STRUCT)
    return {number: value if kind in kinds else None for number, kind, value in fields}


def unpacked_size(descriptor: int, start: int, length: int) -> int:
    """Return the bytes that the pages in `length` bytes from `start` on claim to unpack to.

    Raises OSError where what is there are no pages, or where they do not fit.
    """
    total, at, end = 0, start, start + length
    while at < end:
        header = os.pread(descriptor, min(_HEADER, end - at), at)
        try:
            size, fields = read_struct(header)
            facts = _by_number(fields)
            unpacked, packed = facts[2], facts[3]
            is_page = unpacked >= 0 and packed >= 0
        except _WRONG as error:
            raise OSError(f"there is no page at byte {at:,}") from error
        if not is_page or at + size + packed > end:
            raise OSError(f"the page at byte {at:,} claims {unpacked:,} bytes in {packed:,}")
        total += unpacked
        at += size + packed
    return total
