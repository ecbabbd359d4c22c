"""Thrift's compact protocol, as far as Parquet's footers and page headers use it. The reader trusts no length."""

from __future__ import annotations

from typing import Any, NamedTuple

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)


class Field(NamedTuple):
    """A field of a struct."""

    number: int
    kind: int
    value: Any
    """A boolean, an integer, bytes (of a double too), the fields of a struct, or (kind, values) of a list or a set."""


def read_struct(data: bytes, at: int = 0) -> tuple[int, list[Field]]:
    """Return where a struct ends, and its fields. Raises IndexError past the end of the data, KeyError for an unknown
    kind, RecursionError."""
    number, fields = 0, list[Field]()
    while kind := data[at] & 0x0F:
        step, at = data[at] >> 4, at + 1
        if step:
            number += step
        else:
            at, number = _integer(data, at)
        if kind in (TRUE, FALSE):  # The value is in the kind.
            value: Any = kind == TRUE
        else:
            at, value = _value(data, at, kind)
        fields.append(Field(number, kind, value))
    return at + 1, fields


def _value(data: bytes, at: int, kind: int) -> tuple[int, Any]:
    """Return where a value of this kind ends, and the value."""
    if kind in INTEGERS:
        return _integer(data, at)
    if kind == BINARY:
        at, length = _varint(data, at)
        if at + length > len(data):
            raise IndexError(length)
        return at + length, data[at : at + length]
    if kind == STRUCT:
        return read_struct(data, at)
    if kind in (LIST, SET):
        count, inner, at = data[at] >> 4, data[at] & 0x0F, at + 1
        if count == 15:
            at, count = _varint(data, at)
        if count > len(data) - at:  # Each item has a byte at least.
            raise IndexError(count)
        items = []
        for _ in range(count):
            at, item = _value(data, at, inner)
            items.append(item)
        return at, (inner, items)
    if kind in (TRUE, FALSE, BYTE):
        return at + 1, data[at]
    if kind == DOUBLE:
        return at + 8, data[at : at + 8]
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
