"""Thrift's compact protocol, as much as Parquet's footers and page headers need: parsed, changed and written again."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from mimae.bench.harness.fuzz.draws import damaged, times

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)


class Field(NamedTuple):
    """A field of a struct: its number, its kind and its value; a list's value is (kind of its items, items)."""

    number: int
    kind: int
    value: Any


def parse(data: bytes) -> tuple[list[Field], int]:
    """Return the fields of a sound struct, and its size in bytes."""
    return _struct(data, 0)


def encode(fields: list[Field]) -> bytes:
    """Return the bytes of a struct."""
    written, last = bytearray(), 0
    for number, kind, value in fields:
        kind = (_TRUE if value else _FALSE) if kind in (_TRUE, _FALSE) else kind
        if 0 < number - last < 16:
            written.append((number - last) << 4 | kind)
        else:
            written.append(kind)
            written += _varint(_zigzag(number))
        last = number
        written += b"" if kind in (_TRUE, _FALSE) else _written(kind, value)
    return bytes(written) + b"\0"


def damaged_struct(draw: random.Random, fields: list[Field]) -> list[Field]:
    """Return a struct in which something has another value, is missing or comes twice, at any depth."""
    for _ in times(draw):
        fields = _changed(draw, fields)
    return fields


def _changed(draw: random.Random, fields: list[Field]) -> list[Field]:
    if not fields:
        return fields
    at = draw.randrange(len(fields))
    number, kind, value = fields[at]
    chance = draw.random()
    if chance < 0.04:
        return fields[:at] + fields[at + 1 :]
    if chance < 0.08:
        return [*fields[: at + 1], *fields[at:]]
    return [*fields[:at], Field(number, kind, _other(draw, kind, value)), *fields[at + 1 :]]


def _other(draw: random.Random, kind: int, value: Any) -> Any:
    if kind in _INTEGERS:
        return draw.choice(
            (0, 1, -1, value + 1, value - 1, 2 * value, 7, 2**31 - 1, 2**40, 2**62, -(2**62), draw.randrange(16))
        )
    if kind == _BINARY:
        return draw.choice((b"", b"bytes", b"image", b"label", b"\xff\xfe", damaged(draw, value), b"n" * 70_000))
    if kind == _STRUCT:
        return _changed(draw, value)
    if kind in (_LIST, _SET):
        inner, items = value
        if not items or draw.random() < 0.15:
            return inner, items * draw.choice((0, 2, 100 if len(items) < 100 else 2))
        at = draw.randrange(len(items))
        if draw.random() < 0.1:
            return inner, items[:at] + items[at + 1 :]
        return inner, [*items[:at], _other(draw, inner, items[at]), *items[at + 1 :]]
    if kind in (_TRUE, _FALSE):
        return not value
    return value


def _struct(data: bytes, at: int) -> tuple[list[Field], int]:
    number, fields = 0, list[Field]()
    while kind := data[at] & 0x0F:
        step, at = data[at] >> 4, at + 1
        if step:
            number += step
        else:
            raw, at = _unsigned(data, at)
            number = (raw >> 1) ^ -(raw & 1)
        if kind in (_TRUE, _FALSE):
            fields.append(Field(number, kind, kind == _TRUE))
        else:
            value, at = _value(data, at, kind)
            fields.append(Field(number, kind, value))
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE, _BYTE):
        return data[at], at + 1
    if kind in _INTEGERS:
        raw, at = _unsigned(data, at)
        return (raw >> 1) ^ -(raw & 1), at
    if kind == _DOUBLE:
        return data[at : at + 8], at + 8
    if kind == _BINARY:
        length, at = _unsigned(data, at)
        return data[at : at + length], at + length
    if kind == _STRUCT:
        return _struct(data, at)
    assert kind in (_LIST, _SET), kind
    count, inner, at = data[at] >> 4, data[at] & 0x0F, at + 1
    if count == 15:
        count, at = _unsigned(data, at)
    items = []
    for _ in range(count):
        item, at = _value(data, at, inner)
        items.append(item)
    return (inner, items), at


def _written(kind: int, value: Any) -> bytes:
    if kind in (_TRUE, _FALSE, _BYTE):
        return bytes([int(value) & 0xFF])
    if kind in _INTEGERS:
        return _varint(_zigzag(value))
    if kind == _DOUBLE:
        return bytes(value)
    if kind == _BINARY:
        return _varint(len(value)) + value
    if kind == _STRUCT:
        return encode(value)
    inner, items = value
    head = bytes([min(len(items), 15) << 4 | inner]) + (_varint(len(items)) if len(items) > 14 else b"")
    return head + b"".join(_written(inner, item) for item in items)


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
