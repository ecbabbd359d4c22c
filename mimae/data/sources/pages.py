"""The sizes that the pages of a Parquet column claim, before a reader makes room for them.

A page's header is a struct in thrift's compact protocol, whose second field is the size of the page when unpacked and
whose third is its size in the file.
"""

from __future__ import annotations

import os

_UNPACKED, _PACKED = 2, 3
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_HEADER = 1 << 16
"""Bytes of a header that are looked at; statistics of long values make them long."""


def unpacked_size(descriptor: int, start: int, length: int) -> int:
    """Return the bytes that the pages in `length` bytes from `start` on claim to unpack to.

    Raises OSError where what is there are no pages.
    """
    total, at = 0, start
    while at < start + length:
        header = os.pread(descriptor, min(_HEADER, start + length - at), at)
        try:
            size, fields = _struct(header, 0)
            unpacked, packed = fields[_UNPACKED], fields[_PACKED]
        except (IndexError, KeyError, RecursionError) as error:
            raise OSError(f"there is no page at byte {at:,}") from error
        if unpacked < 0 or packed < 0:
            raise OSError(f"the page at byte {at:,} claims {unpacked:,} bytes in {packed:,}")
        total += unpacked
        at += size + packed
    return total


def _struct(data: bytes, at: int) -> tuple[int, dict[int, int]]:
    """Return where a struct ends, and its fields that are integers. Raises IndexError past the end of the data."""
    number, fields = 0, dict[int, int]()
    while kind := data[at] & 0x0F:
        step, at = data[at] >> 4, at + 1
        if step:
            number += step
        else:
            at, number = _integer(data, at)
        if kind in _INTEGERS:
            at, fields[number] = _integer(data, at)
        elif kind not in (_TRUE, _FALSE):  # These are in their kind.
            at = _skipped(data, at, kind)
    return at + 1, fields


def _skipped(data: bytes, at: int, kind: int) -> int:
    """Return where a value of this kind ends."""
    if kind in (_TRUE, _FALSE, _BYTE):
        return at + 1
    if kind in _INTEGERS:
        return _integer(data, at)[0]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        at, length = _varint(data, at)
        return at + length
    if kind == _STRUCT:
        return _struct(data, at)[0]
    if kind in (_LIST, _SET):
        count, inner, at = data[at] >> 4, data[at] & 0x0F, at + 1
        if count == 15:
            at, count = _varint(data, at)
        for _ in range(count):
            at = _skipped(data, at, inner)
        return at
    raise KeyError(kind)  # Maps do not come in a page's header.


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
