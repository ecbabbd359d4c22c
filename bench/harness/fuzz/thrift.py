"""Structs in thrift's compact protocol, as in Parquet's footers and page headers: changed and written again."""

from __future__ import annotations

import random
from typing import Any

from mimae.bench.harness.fuzz.draws import damaged, times
from mimae.data.sources.thrift import BINARY, BYTE, DOUBLE, FALSE, INTEGERS, LIST, SET, STRUCT, TRUE, Field


def encode(fields: list[Field]) -> bytes:
    """Return the bytes of a struct."""
    written, last = bytearray(), 0
    for number, kind, value in fields:
        kind = (TRUE if value else FALSE) if kind in (TRUE, FALSE) else kind
        if 0 < number - last < 16:
            written.append((number - last) << 4 | kind)
        else:
            written.append(kind)
            written += _varint(_zigzag(number))
        last = number
        written += b"" if kind in (TRUE, FALSE) else _written(kind, value)
    return bytes(written) + b"\0"


def damaged_struct(draw: random.Random, fields: list[Field]) -> list[Field]:
    """Return a struct in which, at any depth, a field has another value, is missing or occurs twice."""
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
    if kind in INTEGERS:
        return draw.choice(
            (0, 1, -1, value + 1, value - 1, 2 * value, 7, 2**31 - 1, 2**40, 2**62, -(2**62), draw.randrange(16))
        )
    if kind == BINARY:
        return draw.choice((b"", b"bytes", b"image", b"label", b"\xff\xfe", damaged(draw, value), b"n" * 70_000))
    if kind == STRUCT:
        return _changed(draw, value)
    if kind in (LIST, SET):
        inner, items = value
        if not items or draw.random() < 0.15:
            return inner, items * draw.choice((0, 2, 100 if len(items) < 100 else 2))
        at = draw.randrange(len(items))
        if draw.random() < 0.1:
            return inner, items[:at] + items[at + 1 :]
        return inner, [*items[:at], _other(draw, inner, items[at]), *items[at + 1 :]]
    if kind in (TRUE, FALSE):
        return not value
    return value


def _written(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE, BYTE):
        return bytes([int(value) & 0xFF])
    if kind in INTEGERS:
        return _varint(_zigzag(value))
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _varint(len(value)) + value
    if kind == STRUCT:
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
