"""Tar shards in WebDataset's format: an index from one pass over the headers, then random access with `os.pread`.

Consecutive members with the same key (the name up to the first dot of its last part) form one sample. Its image is the
first member with the extension of an image. Its class is the number or name in its `.cls`, or in its `.json` under
`label` or `cls`. A defect of one sample, or of the end of a shard, becomes an unreadable sample, which is reported like
any other. A shard that has members but no sample is refused, and the error names it.
"""

from __future__ import annotations

import json
import os
import stat
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources.endings import counted, is_image_ending
from mimae.data.sources.index import STAMPS, Index, IndexedSource, end_to_end, read_all
from mimae.data.sources.tar import (
    BLOCK,
    CUT,
    DAMAGED,
    DOTS,
    DUPLICATE,
    FINE,
    JOINED,
    LINK,
    LONGEST,
    NO_END,
    OUTSIDE,
    End,
    Member,
    Reader,
    intact,
    members,
)
from mimae.outside.text import printable

OPEN_SHARDS = 128
"""Largest number of shards that a process keeps open."""

_LONGEST_NAME = 200
"""Largest number of characters of a class name; longer ones are cut."""

_REASONS = {
    CUT: "the shard ends in the middle of it",
    DUPLICATE: "an earlier sample of the shard has the same key",
    OUTSIDE: "its name points outside of the shard",
    LINK: "it is a link or a device, not a file",
    DOTS: "its name has two dots: the part after the first is not the extension of an image, and its sample has no "
    "other image; set data.image_key to the part after the first dot",
    NO_END: "the shard is cut off at byte {at}; the rest is lost",
    DAMAGED: "the shard is damaged at byte {at}, where a header should be; the rest is lost",
    JOINED: "the shard continues after its end mark at byte {at} (joined archives?); the rest is not read",
}


class ShardSource(IndexedSource):
    """The samples of tar shards, shard by shard, in the order of their members."""

    def __init__(self, name: str, shards: Sequence[Path], index: Index, settings: DataSettings) -> None:
        super().__init__(name, index, settings.max_bytes)
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
        self.check_size(size)
        # This reference keeps the file open during the read, even if the cache drops it in another thread.
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
    """An open file, closed with its last reference. It is read at explicit offsets, so processes may share it."""

    def __init__(self, path: bytes) -> None:
        # O_NONBLOCK: opening a pipe would wait for a writer.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        # `fd` is missing if the file could not be opened.
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


def read_headers(shards: Sequence[Path], settings: DataSettings) -> Index:
    """Read the headers of shards and return their index. Raises DataError that lists all files that are not shards."""
    rules = _Rules.of(settings)
    found = read_all("shards", shards, partial(_scan, rules))
    # Single shards may be empty: `mimae data pack` writes such a shard if none of its samples can be used.
    if not any(len(shard.at) for shard in found):
        raise DataError(f"{printable(str(shards[0].parent))}: the shards contain no images")
    starts = end_to_end(np.array([len(shard.at) for shard in found]))
    flaw = np.concatenate([_flaws(shard) for shard in found])
    labels, classes, notes = _labels(found, flaw)
    return Index(
        np.frombuffer(b"".join(shard.names for shard in found), np.uint8),
        end_to_end(np.concatenate([shard.lengths for shard in found])),
        labels,
        classes,
        [os.fsencode(shard) for shard in shards],
        {
            "starts": starts,
            "at": np.concatenate([shard.at for shard in found]),
            "size": np.concatenate([shard.size for shard in found]),
            "flaw": flaw,
            STAMPS: np.array([shard.stamp for shard in found], np.int64),
        },
        [*notes, *_left_out(shards, found)] if rules.version > 1 else [],
    )


class _Rules(NamedTuple):
    """Rules that decide by a member's extension (everything after the first dot) whether it is an image or a class."""

    version: int
    image_key: bytes | None
    label_key: str | None

    @classmethod
    def of(cls, settings: DataSettings) -> _Rules:
        key = settings.image_key
        return cls(settings.index_version, None if key is None else key.lower().encode(), settings.label_key)

    def is_image(self, ending: bytes) -> bool:
        return is_image_ending(ending, self.version) if self.image_key is None else ending == self.image_key

    def is_label(self, ending: bytes) -> bool:
        return ending in ((b"cls", b"json") if self.label_key is None else (self.label_key.lower().encode(), b"json"))


class _Samples:
    """The samples of one shard, stored by column."""

    def __init__(self, stamp: tuple[int, int]) -> None:
        self.stamp = stamp
        self.names = bytearray()
        self.lengths, self.at, self.size = array("q"), array("q"), array("q")
        self.labels, self.keys = array("q"), array("q")
        self.flaw = array("b")
        self.classes: dict[str, int] = {}
        """Code of each class name, in order of appearance; `labels` contains code k as -2 - k."""
        self.others, self.dotted, self.further = Counter[str](), Counter[str](), Counter[str]()
        """Members without use: neither images nor classes; images with two dots in their names; images of samples that
        already have one."""
        self.unlabelled, self.meaningless = 0, b""
        """Number of members that may contain a class and contain none, and the name of the first one."""
        self.orphans: list[bytes] = []
        """Names of members that contain a class but do not follow an image."""

    def label(self, value: int | str | None) -> int:
        """Return the value that represents a class number, a class name or no class in `labels`."""
        if isinstance(value, str):
            return -2 - self.classes.setdefault(value, len(self.classes))
        return -1 if value is None else value

    def add(self, name: bytes, key: bytes, at: int, size: int, flaw: int) -> None:
        self.names += name
        self.lengths.append(len(name))
        self.at.append(at)
        self.size.append(size)
        self.keys.append(hash(key))
        self.flaw.append(flaw)


def _flaws(samples: _Samples) -> np.ndarray:
    """Return the flaws, int8 (n,), with DUPLICATE for samples that repeat the key of an earlier one."""
    flaw = np.array(samples.flaw, np.int8)
    keys = np.array(samples.keys)
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order][1:] == keys[order][:-1]]
    flaw[again[flaw[again] == FINE]] = DUPLICATE
    return flaw


def _labels(found: Sequence[_Samples], flaw: np.ndarray) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Return the classes and their names, if every readable sample has a class, and notes on why they are not used."""
    labels = np.concatenate([shard.labels for shard in found])
    fine, notes = labels[flaw == FINE], list[str]()
    if orphans := [name for shard in found for name in shard.orphans]:
        notes.append(
            f"{len(orphans):,} members with a class do not follow their image and are left out, for example "
            f"{printable(os.fsdecode(orphans[0]))}"
        )
    if (labels == -1).all():
        if unlabelled := sum(shard.unlabelled for shard in found):
            first = next(filter(None, (shard.meaningless for shard in found)))
            notes.append(
                f"no sample has a class, since none of {unlabelled:,} members that may have one has a number from 0 on "
                f"or a name, a .json under label or cls (data.label_key names another key), for example "
                f"{printable(os.fsdecode(first))}"
            )
        return None, None, notes
    if (without := int((fine == -1).sum())) or ((fine < -1).any() and (fine >= 0).any()):
        some = f"{without:,} of {len(fine):,} samples have none" if without else "some have numbers and some have names"
        return None, None, [*notes, f"no sample has a class, since {some}"]
    names = None
    if (fine < -1).any():
        names = sorted({name for shard in found for name in shard.classes})
        number = {name: i for i, name in enumerate(names)}
        labels = np.concatenate([_numbered(shard, number) for shard in found])
    # Samples without a class are unreadable and never used. They get the smallest class so that the numbers are valid.
    return np.where(labels < 0, labels[labels >= 0].min(), labels), names, notes


def _numbered(shard: _Samples, number: dict[str, int]) -> np.ndarray:
    """Return the class numbers of a shard whose classes have names, int64 (n,)."""
    of_code = np.array([-1, *(number[name] for name in shard.classes)], np.int64)
    return of_code[np.minimum(-1 - np.array(shard.labels, np.int64), len(shard.classes)).clip(0)]


def _left_out(shards: Sequence[Path], found: Sequence[_Samples]) -> list[str]:
    """Return notes about members that are neither images nor classes."""
    notes = []
    if dotted := sum((shard.dotted for shard in found), Counter[str]()):
        ending, count = dotted.most_common(1)[0]
        notes.append(
            f"{dotted.total():,} samples cannot be used, since their images have names with two dots: "
            f"data.image_key={printable(ending)} selects {count:,} of them"
        )
    if further := sum((shard.further for shard in found), Counter[str]()):
        notes.append(
            f"left out of the shards, since the first image of a sample is its image: {counted(further)}; "
            f"data.image_key names the one to use"
        )
    if others := sum((shard.others for shard in found), Counter[str]()):
        notes.append(f"left out of the shards, since they are neither images nor classes: {counted(others)}")
    return notes


def _scan(rules: _Rules, path: Path) -> _Samples | str:
    """Return the samples of a shard, or the reason why it has none."""
    try:
        opened = _Opened(os.fsencode(path))
        status = os.fstat(opened.fd)
        if not stat.S_ISREG(status.st_mode):
            return "it is not a regular file"
        reader = Reader(opened.fd, status.st_size)
        if problem := _no_tar(reader):
            return problem
        samples = _Samples((status.st_mtime_ns, status.st_size))
        first = _collect(reader, samples, rules)
    except OSError as error:
        return error.strerror or str(error)
    if first and not any(samples.lengths):
        legal = (
            ""
            if rules.image_key is None
            else f" whose name ends in .{rules.image_key.decode()}, as data.image_key says"
        )
        return f"it contains no image{legal}; its first members are {', '.join(first)}"
    return samples


def _no_tar(reader: Reader) -> str | None:
    head = reader.read(0, BLOCK)
    if not head:
        return "it is empty, 0 bytes"
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if head.startswith(magic):
            return f"it is compressed ({name}), which does not allow random access; unpack it"
    if len(head) < BLOCK or (head.strip(b"\0") and not intact(head)):
        return f"it is not a tar file (it begins with {head[:16]!r})"
    return None


def _collect(reader: Reader, samples: _Samples, rules: _Rules) -> list[str]:
    """Append the samples that the members form. Returns the names of the first few members."""
    first: list[str] = []
    key, image, labelled = b"", b"", b""
    label: int | str | None = None
    dotted: list[Member] = []

    def close() -> None:
        for member in dotted:
            if not image:
                samples.add(member.name, key, member.at, member.size, DOTS)
            _count(samples.further if image else samples.dotted, _ending(member.name))
        if labelled and not image and not dotted:
            samples.orphans.append(labelled)
        samples.labels.extend([samples.label(label)] * (len(samples.at) - len(samples.labels)))

    for member in members(reader):
        if isinstance(member, End):
            close()
            key, label, image, labelled, dotted = b"", None, b"", b"", []
            samples.add(b"", b"\0", member.at, 0, member.flaw)
            continue
        name = member.name
        if len(first) < 3:
            first.append(os.fsdecode(name))
        dot = name.find(b".", name.rfind(b"/") + 1)
        if dot <= name.rfind(b"/") + 1:  # No extension, or a hidden file.
            if dot < 0 and member.flaw == FINE:
                _count(samples.others, b"")
            continue
        if name[:dot] != key:
            close()
            key, label, image, labelled, dotted = name[:dot], None, b"", b"", []
        ending = name[dot + 1 :].lower()
        if rules.is_image(ending):
            # A second image of a sample is ignored, unless it has the first one's name: that is a duplicate.
            if image in (b"", name):
                samples.add(name, key, member.at, member.size, member.flaw or (OUTSIDE if _leads_out(name) else FINE))
                image = name
            elif member.flaw == FINE:
                _count(samples.further, ending)
        elif rules.is_label(ending) and member.flaw == FINE and member.size <= LONGEST:
            if label is None or ending != b"json":
                found = _label(reader.read(member.at, member.size), ending, rules)
                if found is not None:
                    label, labelled = found, name
                elif label is None:
                    samples.unlabelled += 1
                    samples.meaningless = samples.meaningless or name
        elif rules.image_key is None and is_image_ending(ending.rpartition(b".")[2], rules.version):
            dotted.append(member)
        elif member.flaw == FINE:
            _count(samples.others, ending)
    close()
    return first


_MOST_ENDINGS = 1000


def _count(endings: Counter[str], ending: bytes) -> None:
    """Count a member by its extension. Their number is limited, since names like 0.123.x could fill the memory."""
    text = ending.decode("utf-8", "replace")[:16]
    if text in endings or len(endings) < _MOST_ENDINGS:
        endings[text] += 1


def _ending(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[2].lower()


def _leads_out(name: bytes) -> bool:
    return name.startswith(b"/") or b".." in name.split(b"/")


def _label(data: bytes, ending: bytes, rules: _Rules) -> int | str | None:
    """Return the class number or name in a label's member, or None if it has none. Version 1 ignores names."""
    value: Any = None
    with suppress(ValueError, RecursionError):
        if ending == b"json":
            value = json.loads(data)
            if isinstance(value, dict):
                value = value.get("label", value.get("cls")) if rules.label_key is None else value.get(rules.label_key)
        else:
            value = data.decode("utf-8").strip()
    if isinstance(value, str):
        number = None
        with suppress(ValueError):
            number = float(value)
            if rules.version > 1 or ending != b"json":
                value = int(value)
        if number is None:
            return value[:_LONGEST_NAME] if rules.version > 1 and value else None
    return value if type(value) is int and 0 <= value < 1 << 31 else None
