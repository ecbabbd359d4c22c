"""Format-aware damage: checksums and lengths are repaired, so that readers look beyond the first bytes."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

from mimae.bench.harness.fuzz.draws import damaged, integer, times

BLOCK = 512


# JPEG: segments between markers


def jpeg(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return a JPEG with other segments, lengths, sizes or tables."""
    segments = _segments(data)
    for _ in times(draw):
        at = draw.randrange(len(segments))
        marker, content = segments[at]
        chance = draw.random()
        if chance < 0.15:
            segments.insert(at, draw.choice(segments))
        elif chance < 0.25 and len(segments) > 1:
            del segments[at]
        elif chance < 0.35:
            segments[at] = (
                bytes([0xFF, draw.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xD9, 0xDA, 0xDB, 0xE1, 0xEE, 0xFE))]),
                content,
            )
        elif chance < 0.5 and (sizes := [i for i, (m, _) in enumerate(segments) if 0xC0 <= m[1] <= 0xC2]):
            frame = segments[sizes[0]]
            place = draw.choice((2, 3, 4, 5, 6, 7, 8, 9))  # precision, height, width, components, sampling factors
            segments[sizes[0]] = (
                frame[0],
                frame[1][:place] + integer(draw, draw.choice((1, 2)), 16) + frame[1][place + 1 :],
            )
        elif chance < 0.6:
            scans = [each for each in segments if each[0][1] == 0xDA]
            segments[-1:-1] = scans[:1] * draw.choice((1, 10, 2000))
        else:
            fits = draw.random() < 0.7
            content = damaged(draw, content[2:], others)
            length = struct.pack(">H", (len(content) + 2) % 65_536) if fits else integer(draw, 2, len(content))
            segments[at] = marker, length + content
    return b"".join(marker + content for marker, content in segments)


def _segments(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the segments of a valid JPEG as (marker, content). Entropy-coded bytes belong to their scan."""
    found, at = [], 0
    while at < len(data):
        end = at + 2
        while end < len(data) - 1 and not (data[end] == 0xFF and data[end + 1] not in (0, *range(0xD0, 0xD8), 0xFF)):
            # If there is a length, the segment is skipped by it, because its content may look like markers.
            jump = end == at + 2 and data[at + 1] not in (0xD8, 0xD9)
            end += struct.unpack(">H", data[end : end + 2])[0] if jump else 1
        end = len(data) if end >= len(data) - 1 else end
        found.append((data[at : at + 2], data[at + 2 : end]))
        at = end
    return found


# PNG: chunks with checksums


def png(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return a PNG with other chunks, whose lengths and checksums are usually right."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in times(draw):
        at = draw.randrange(len(chunks))
        kind, content = chunks[at]
        chance = draw.random()
        if chance < 0.15:
            chunks.insert(at, draw.choice(chunks))
        elif chance < 0.25 and len(chunks) > 1:
            del chunks[at]
        elif chance < 0.35:
            bomb = zlib.compress(bytes(draw.choice((10**4, 10**7))))
            chunks.insert(1, draw.choice(((b"iCCP", b"x\0\0" + bomb), (b"zTXt", b"x\0\0" + bomb), (b"IDAT", bomb))))
        elif chance < 0.45:
            chunks.insert(
                1,
                (
                    draw.choice((b"acTL", b"fcTL", b"eXIf", b"tRNS", b"PLTE", b"gAMA")),
                    draw.randbytes(draw.randrange(30)),
                ),
            )
        elif chance < 0.65:
            place = draw.choice((0, 4, 8, 9, 10, 11, 12))
            width = 4 if place < 8 else 1
            header = chunks[0][1]
            chunks[0] = chunks[0][0], header[:place] + integer(draw, width, 16) + header[place + width :]
        elif kind == b"IDAT" and chance < 0.85:
            chunks[at] = kind, zlib.compress(damaged(draw, _inflated(content), others))
        else:
            chunks[at] = kind, damaged(draw, content, others)
    checked = draw.random() < 0.9
    return data[:8] + b"".join(
        struct.pack(">I", len(content) % 2**32)
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content) * checked)
        for kind, content in chunks
    )


def _inflated(content: bytes) -> bytes:
    try:
        return zlib.decompress(content)
    except zlib.error:
        return content


# TIFF: entries of twelve bytes in a directory


def tiff(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return a TIFF with changed entries in its directory: tags, types, counts, values."""
    order = "<" if data.startswith(b"II") else ">"
    changed = bytearray(data)
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
    except struct.error:
        return damaged(draw, data, others)
    for _ in times(draw):
        entry = start + 2 + 12 * draw.randrange(max(1, count))
        place, width = draw.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2)))
        if entry + place + width <= len(changed):
            number = draw.choice(
                (draw.choice((254, 256, 257, 258, 259, 277, 278, 322, 323, 324, 273, 279, 339)), draw.randrange(14))
            )
            value = (
                integer(draw, width, len(data))
                if draw.random() < 0.6
                else struct.pack(order + "HI"[width == 4], number)
            )
            changed[entry + place : entry + place + width] = value
    return bytes(changed)


# Boxes of ISO files (AVIF, JPEG 2000) and chunks of RIFF (WebP)


def boxes(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the file with a changed length or content of a box."""
    places = [
        at
        for at in range(0, len(data) - 8)
        if data[at + 4 : at + 8].isalnum() and int.from_bytes(data[at : at + 4], "big") <= len(data)
    ]
    for _ in times(draw):
        if not places:
            return damaged(draw, data, others)
        at = draw.choice(places)
        if draw.random() < 0.5:
            data = data[:at] + integer(draw, 4, len(data)) + data[at + 4 :]
        else:
            data = data[: at + 8] + damaged(draw, data[at + 8 : at + 40], others) + data[at + 40 :]
    return data


# Tar: headers with checksums


def tar(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return an archive with other members, or with changed headers, whose checksums are usually right."""
    headers = tar_headers(data)
    for _ in times(draw):
        if not headers:
            return damaged(draw, data, others)
        at = draw.choice(headers)
        header = data[at : at + BLOCK]
        chance = draw.random()
        if chance < 0.2:
            data = data[:at] + _extra(draw, header) + data[at:]
        elif chance < 0.3:
            data = data[:at] + data[at + BLOCK :]
        elif chance < 0.4:
            other = draw.choice(headers)
            data = data[:at] + data[other : other + 2 * BLOCK] + data[at:]
        else:
            data = data[:at] + tar_field(draw, header, len(data)) + data[at + BLOCK :]
        headers = tar_headers(data)
    return data


def tar_headers(data: bytes) -> list[int]:
    """Return the offsets of blocks that look like headers."""
    return [at for at in range(0, len(data) - BLOCK + 1, BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def tar_field(draw: random.Random, header: bytes, near: int) -> bytes:
    """Return a header with a changed field, usually with the right checksum."""
    name, start, width = draw.choice(
        (
            ("name", 0, 100),
            ("size", 124, 12),
            ("size", 124, 12),
            ("kind", 156, 1),
            ("prefix", 345, 155),
            ("magic", 257, 8),
            ("link", 157, 100),
        )
    )
    if name == "size":
        number = int.from_bytes(integer(draw, draw.choice((1, 4, 8)), near), "big")
        field = draw.choice(
            (
                b"%011o\0" % (number % 8**11),
                b"\x80" + number.to_bytes(11, "big"),
                b"\xff" * 12,
                b"%d" % (number % 10**11),
            )
        )
    elif name == "kind":
        field = draw.choice(
            (b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"D", b"\xff")
        )
    elif name == "magic":
        field = draw.choice((b"ustar\x0000", b"ustar  \0", bytes(8), b"ustar\0\0\0"))
    else:
        field = draw.choice(
            (
                b"",
                b".",
                b"/",
                b"../../canary/file.jpg",
                b"/etc/passwd.jpg",
                b"a.b.c.jpg",
                b".jpg",
                b"x" * width,
                b"\xff\xfe.png",
                b"\x1b[2J.jpg",
                b"000.jpg",
                b"000.cls",
            )
        )
    header = header[:start] + field.ljust(width, b"\0")[:width] + header[start + width :]
    return tar_sealed(header) if draw.random() < 0.85 else header


def tar_sealed(header: bytes) -> bytes:
    """Return a header with the right checksum."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def _extra(draw: random.Random, header: bytes) -> bytes:
    """Return an extension header of pax or GNU with its content; it precedes another header."""
    kind = draw.choice((b"x", b"g", b"L", b"K"))
    if kind in (b"x", b"g"):
        key = draw.choice((b"path", b"size", b"GNU.sparse.size", b"hdrcharset", b"linkpath"))
        value = draw.choice(
            (
                b"%d" % draw.choice((0, 1, 511, 2**40, 10**19)),
                b"../x.jpg",
                b"\xff.jpg",
                b"y" * 3000 + b".jpg",
                b"-1",
                b"",
            )
        )
        length = len(key) + len(value) + 3
        length += len(b"%d" % (length + len(b"%d" % length)))
        content = draw.choice((b"%d" % length, b"0", b"99999999999", b"-5", b"5")) + b" " + key + b"=" + value + b"\n"
    else:
        content = draw.choice((b"z" * 300 + b".jpg\0", b"../../canary/file\0", b"", b"\0", draw.randbytes(40)))
    told = len(content) if draw.random() < 0.8 else draw.choice((0, 1, 2**20 + 1, 8**11 - 1))
    block = tar_sealed(b"long".ljust(124, b"\0") + b"%011o\0" % told + header[136:156] + kind + header[157:])
    return block + content + bytes(-len(content) % BLOCK)


# Zip files, in which torch stores tensors


def rezipped(draw: random.Random, data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return a zip file with the content of one member changed, and with right sizes and checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return change(data)
    at = draw.randrange(len(members)) if members else 0
    method = zipfile.ZIP_DEFLATED if draw.random() < 0.1 else zipfile.ZIP_STORED
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for i, (name, content) in enumerate(members):
            archive.writestr(name, change(content) if i == at else content)
    return made.getvalue()
