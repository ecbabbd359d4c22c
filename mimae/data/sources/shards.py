"""Tar shards in WebDataset's form: an index from one pass over their headers, then random access by `os.pread`.

Members that follow one another and share a key (the name up to the first dot of its last part) are one sample: its
image the first member with the ending of an image, its class the number in its `.cls`, or in its `.json` under `label`
or `cls`. What is wrong with one sample, or with the end of a shard, becomes a sample that cannot be read and
is reported like any other; a shard that has members and gives nothing is refused by name.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import EXTENSIONS
from mimae.data.sources.index import STAMPS, Index, IndexedSource, end_to_end, read_all

OPEN_SHARDS = 128
"""Shards that a process holds open at most."""

_BLOCK = 512
_LEAST_AHEAD, _MOST_AHEAD = 4096, 1 << 20
_IMAGES = frozenset(extension.encode() for extension in EXTENSIONS)
_LONGEST = 1 << 20
"""Bytes that a name or a label takes at most."""
_LABELS = (b"cls", b"json")
_LARGEST = (1 << 63) - 1
_DIGITS = 18
"""Of a decimal number at most, which then fits."""
_PADDING = 1 << 20
"""Zeros that archivers fill their last record up with at most, an archive without members apart: that has one record of
_EMPTY bytes. More are what a file system leaves of what was never written."""
_EMPTY = 20 * _BLOCK

_FINE, _CUT, _DUPLICATE, _OUTSIDE, _LINK, _DOTS, _NO_END, _DAMAGED, _JOINED = range(9)
_REASONS = {
    _CUT: "the shard ends in the middle of it",
    _DUPLICATE: "an earlier sample of the shard has the same key",
    _OUTSIDE: "its name leads out of the shard",
    _LINK: "it is a link or a device, not a file",
    _DOTS: "its name has two dots: what follows the first is no ending of an image, and its sample has no other image",
    _NO_END: "the shard is cut off at byte {at}; what followed is lost",
    _DAMAGED: "the shard is damaged at byte {at}, where a header should be; what follows is lost",
    _JOINED: "the shard goes on behind its end mark at byte {at} (joined archives?); what follows is not read",
}


class ShardSource(IndexedSource):
    """The samples of tar shards, in the order of the shards and of their members."""

    def __init__(self, name: str, shards: Sequence[Path], index: Index) -> None:
        super().__init__(name, index)
        self._shards = [os.fsencode(shard) for shard in shards]

    @property
    def blocks(self) -> np.ndarray:
        return self.index.places["starts"]

    def path(self, i: int) -> str:
        name = self.index.name(i)
        shard = self._shards[self._shard(i)]
        return os.fsdecode(shard + b"/" + name if name else shard)

    def read(self, i: int) -> bytes:
        places, shard = self.index.places, self._shard(i)
        at, flaw = int(places["at"][i]), int(places["flaw"][i])
        if flaw:
            raise OSError(_REASONS[flaw].format(at=at))
        size = int(places["size"][i])
        # Held until the bytes are there: the cache may let go of it, another thread's close would be too early.
        opened = _opened(self._shards[shard], *map(int, places[STAMPS][shard]))
        data = os.pread(opened.fd, size, at)
        if len(data) < size:
            raise OSError("the shard has become shorter")
        return data

    def _shard(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self.blocks, i, "right")) - 1


class _Opened:
    """An open file, closed when nobody holds it any more. Reads at given places, so processes may share it."""

    def __init__(self, path: bytes) -> None:
        # A pipe would wait for who writes into it.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        # Not there if it could not be opened.
        if hasattr(self, "fd"):
            os.close(self.fd)


@lru_cache(OPEN_SHARDS)
def _opened(path: bytes, changed: int, size: int) -> _Opened:
    opened = _Opened(path)
    status = os.fstat(opened.fd)
    if (status.st_mtime_ns, status.st_size) != (changed, size):
        raise OSError("the shard has changed since the run began")
    return opened


# The index


def read_headers(shards: Sequence[Path]) -> Index:
    """The index of shards, their headers read once. Raises DataError with every shard that is none."""
    found = read_all("shards", shards, _scan)
    # One shard may be empty, as when nothing of it could be packed.
    if not any(len(shard.at) for shard in found):
        raise DataError(f"{shards[0].parent}: the shards hold no images")
    starts = end_to_end(np.array([len(shard.at) for shard in found]))
    flaw = np.concatenate([_flaws(shard) for shard in found])
    return Index(
        np.frombuffer(b"".join(shard.names for shard in found), np.uint8),
        end_to_end(np.concatenate([shard.lengths for shard in found])),
        _labels(np.concatenate([shard.labels for shard in found]), flaw),
        None,
        [os.fsencode(shard) for shard in shards],
        {
            "starts": starts,
            "at": np.concatenate([shard.at for shard in found]),
            "size": np.concatenate([shard.size for shard in found]),
            "flaw": flaw,
            STAMPS: np.array([shard.stamp for shard in found], np.int64),
        },
    )


class _Samples:
    """The samples of one shard, a column each."""

    def __init__(self, stamp: tuple[int, int]) -> None:
        self.stamp = stamp
        self.names = bytearray()
        self.lengths, self.at, self.size = array("q"), array("q"), array("q")
        self.labels, self.keys = array("q"), array("q")
        self.flaw = array("b")

    def add(self, name: bytes, key: bytes, at: int, size: int, flaw: int) -> None:
        self.names += name
        self.lengths.append(len(name))
        self.at.append(at)
        self.size.append(size)
        self.keys.append(hash(key))
        self.flaw.append(flaw)


def _flaws(samples: _Samples) -> np.ndarray:
    """int8 (n,): with those samples marked that repeat the key of an earlier one."""
    flaw = np.array(samples.flaw, np.int8)
    keys = np.array(samples.keys)
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order][1:] == keys[order][:-1]]
    flaw[again[flaw[again] == _FINE]] = _DUPLICATE
    return flaw


def _labels(labels: np.ndarray, flaw: np.ndarray) -> np.ndarray | None:
    """The classes, where every sample that can be read has one."""
    if (labels[flaw == _FINE] < 0).any() or (labels < 0).all():
        return None
    # A sample without is never seen; it has to count for some class, so for one that there is.
    return np.where(labels < 0, labels[labels >= 0].min(), labels)


def _scan(path: Path) -> _Samples | str:
    """The samples of a shard, or why it gives none."""
    try:
        opened = _Opened(os.fsencode(path))
        status = os.fstat(opened.fd)
        reader = _Reader(opened.fd, status.st_size)
        if problem := _no_tar(reader):
            return problem
        samples = _Samples((status.st_mtime_ns, status.st_size))
        first = _collect(reader, samples)
    except OSError as error:
        return error.strerror or str(error)
    if first and not any(samples.lengths):
        return f"it holds no image; its first members are {', '.join(first)}"
    return samples


def _no_tar(reader: _Reader) -> str | None:
    head = reader.read(0, _BLOCK)
    if not head:
        return "it is empty, 0 bytes"
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if head.startswith(magic):
            return f"it is compressed ({name}), which leaves no random access; unpack it"
    if len(head) < _BLOCK or (head.strip(b"\0") and not _intact(head)):
        return f"it is no tar file (it begins with {head[:16]!r})"
    return None


def _collect(reader: _Reader, samples: _Samples) -> list[str]:
    """Appends the samples that the members make up; returns the names of the first few members."""
    first: list[str] = []
    key, label, image = b"", -1, b""
    dotted: list[_Member] = []

    def close() -> None:
        for member in [] if image else dotted:
            samples.add(member.name, key, member.at, member.size, _DOTS)
        samples.labels.extend([label] * (len(samples.at) - len(samples.labels)))

    for member in _members(reader):
        if isinstance(member, _End):
            close()
            key, label, image, dotted = b"", -1, b"", []
            samples.add(b"", b"\0", member.at, 0, member.flaw)
            continue
        name = member.name
        if len(first) < 3:
            first.append(os.fsdecode(name))
        dot = name.find(b".", name.rfind(b"/") + 1)
        if dot <= name.rfind(b"/") + 1:  # No ending, or a hidden file.
            continue
        if name[:dot] != key:
            close()
            key, label, image, dotted = name[:dot], -1, b"", []
        ending = name[dot + 1 :].lower()
        if ending in _IMAGES:
            # Another image beside the first is part of the sample that nobody asked for, but not by the same name.
            if image in (b"", name):
                samples.add(name, key, member.at, member.size, member.flaw or (_OUTSIDE if _leads_out(name) else _FINE))
                image = name
        elif ending in _LABELS and member.flaw == _FINE and member.size <= _LONGEST:
            if label < 0 or ending == b"cls":
                label = _label(reader.read(member.at, member.size), ending, label)
        elif ending.rpartition(b".")[2] in _IMAGES:
            dotted.append(member)
    close()
    return first


def _leads_out(name: bytes) -> bool:
    return name.startswith(b"/") or b".." in name.split(b"/")


def _label(data: bytes, ending: bytes, default: int) -> int:
    """The class number in a `.cls` or `.json` member, or `default` where there is none."""
    with suppress(ValueError, RecursionError):
        value = json.loads(data) if ending == b"json" else int(data)
        if isinstance(value, dict):
            value = value.get("label", value.get("cls"))
        if type(value) is int and 0 <= value < 1 << 31:
            return value
    return default


# The format


class _Member(NamedTuple):
    """A file of the archive; links and devices have the flaw of being one."""

    name: bytes
    at: int
    size: int
    flaw: int


class _End(NamedTuple):
    """Where an archive ends that should not end there."""

    at: int
    flaw: int


class _Reader:
    """Small reads at rising places. It reads ahead, the further the closer the places lie together: one read for many
    small members, and not much of a large image for its header."""

    def __init__(self, fd: int, end: int) -> None:
        self.fd, self.end = fd, end
        self._start, self._data, self._ahead = 0, b"", _LEAST_AHEAD

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes from `at` on, fewer at the end of the file. Raises OSError."""
        offset = at - self._start
        if offset < 0 or offset + size > len(self._data):
            near = offset <= len(self._data) + self._ahead
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if near else _LEAST_AHEAD
            self._start, self._data, offset = at, os.pread(self.fd, max(size, self._ahead), at), 0
        return self._data[offset : offset + size]


def _members(reader: _Reader) -> Iterator[_Member | _End]:
    """The members of a ustar, GNU or pax archive, and last an _End if it does not end as it should."""
    at = 0
    name: bytes | None = None
    size: int | None = None
    while True:
        header = reader.read(at, _BLOCK)
        if len(header) < _BLOCK:
            yield _End(min(at, reader.end), _NO_END)
            return
        if not header.strip(b"\0"):
            if reader.read(at, min(reader.end - at, _PADDING)).strip(b"\0"):
                yield _End(at, _JOINED)
            elif reader.end - at > (_PADDING if at else _EMPTY):
                yield _End(at, _NO_END)
            return
        length = _number(header[124:136])
        if not _intact(header) or length is None:
            yield _End(at, _DAMAGED)
            return
        kind, data = header[156:157], at + _BLOCK
        if kind in b"LKxg" and length > _LONGEST:
            yield _End(at, _DAMAGED)
            return
        if kind == b"L":
            name = reader.read(data, length).rstrip(b"\0")
        elif kind == b"x":
            records = _records(reader.read(data, length))
            name = records.get(b"path", name)
            told = records.get(b"size", b"")
            if told.isdigit() and len(told) > _DIGITS:
                yield _End(at, _DAMAGED)
                return
            size = int(told) if told.isdigit() else size
        elif kind not in b"Kg":
            regular = kind in b"07\0"
            # Links carry no data, whatever size they tell.
            length = 0 if kind in b"123456" else length if size is None else size
            cut = data + length > reader.end
            yield _Member(name or _name(header), data, length, _LINK if not regular else _CUT if cut else _FINE)
            if cut:
                yield _End(reader.end, _NO_END)
                return
            name = size = None
        at = data + -(-length // _BLOCK) * _BLOCK


def _intact(header: bytes) -> bool:
    """Whether the header's sum is the one that it tells, its own eight bytes counted as spaces."""
    field = header[148:156]
    told = _number(field)
    # Adler-32's lower half is one more than the sum of the bytes, modulo 65521, at a tenth of the time of sum().
    return told is not None and zlib.adler32(header) & 0xFFFF == (told - 8 * 32 + sum(field) + 1) % 65521


def _number(field: bytes) -> int | None:
    """A number of a header, below 2^63: octal digits or, where the first bit is set, base 256."""
    if field[0] & 0x80:
        number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return number if number <= _LARGEST else None
    digits = field.strip(b" \0") or b"0"
    return int(digits, 8) if not digits.strip(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU's own headers have other things in the place of ustar's prefix.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(data: bytes) -> dict[bytes, bytes]:
    """The `length key=value` records of a pax header; what is damaged counts for nothing."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > _DIGITS or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        data = data[int(length) :]
    return records
