"""`mimae data pack`: writes a source as tar shards, with its images unchanged, transcoded or resized.

Shard k contains samples k S to (k + 1) S - 1. Each shard is written under a temporary name and renamed when it is
complete, so that an interrupted packing resumes with the missing shards. A JSON file next to the shards records the
source and the options; both have to be the same when packing resumes. A packing locks the file .NAME.lock, so that no
other one writes the same shards, in whatever container or on whatever host. Some file systems have no locks, or locks
that other hosts do not see. There, one of two packings may fail, but they never write to the same file.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from mimae.data.loading.batch import BadSample, DataError
from mimae.data.loading.processes import over
from mimae.data.pixels import jpeg
from mimae.data.pixels.decode import BadImage, format_of, look, whole, why
from mimae.data.sources.base import Source
from mimae.outside.files import sync, write_atomically
from mimae.outside.text import say

QUALITY = 95
"""JPEG quality of resized images."""

_LONGEST_SIDE = 65_500
"""Longest side in pixels of an image that libjpeg can write."""

_ENDINGS = {"PNG": "png", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp"}
"""Extension by image format. All other formats get jpg: it marks the member as an image, and readers use the bytes."""


class Packing(NamedTuple):
    """A source to pack, the target and the options."""

    source: Source
    target: Path
    """DIR/NAME.tar, which stands for the shards DIR/NAME-00000.tar and so on."""
    samples: int
    """Number of samples per shard."""
    shortest: int | None
    """Shortest side of resized images in pixels. Images that are not larger stay unchanged; with None all do."""
    max_pixels: int
    white: int | None = None
    """data.range, for images that are resized."""
    lossless: bool = False
    """Whether JPEGs are transcoded to files of the same pixels whose regions are faster to decode."""

    def shard(self, number: int) -> Path:
        # All numbers have the width of the last one, so that the names sort in order.
        width = max(5, len(str(self.numbers()[-1])))
        return self.target.with_name(f"{self.target.stem}-{number:0{width}}.tar")

    def left_out(self, number: int) -> Path:
        """Return the path of the list of samples that a shard leaves out. It exists until all shards are complete."""
        return self.target.with_name(f".{self.shard(number).name}.jsonl")

    def numbers(self) -> range:
        return range(-(-len(self.source) // self.samples))


def pack(packing: Packing, workers: int) -> tuple[int, int]:
    """Write the missing shards. Returns their number and the number of samples that all shards leave out.

    Unusable samples are left out, the others keep their numbers, and DIR/NAME.bad_samples.jsonl lists what was left
    out. Raises DataError.
    """
    try:
        packing.target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(packing) as is_locked:
            _same_as_before(packing)
            if is_locked:
                _sweep(packing)
            missing = [number for number in packing.numbers() if not packing.shard(number).exists()]
            for _ in over(missing, _write_shard, packing, workers=workers, title="packing", unit="shards"):
                pass
            return len(missing), _gather(packing)
    except OSError as error:
        raise DataError(
            f"packing into {packing.target.parent} failed: {error.strerror or error}. Complete shards are kept; the "
            f"same command writes the others"
        ) from error


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

_NO_LOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)
"""Errors of flock where a file cannot be locked. NFS raises EBADF for a file that is only open for reading."""


@contextmanager
def _locked(packing: Packing) -> Iterator[bool]:
    """Hold the lock of the shards' name. Yield whether there is one: a file system may have no locks.

    A killed packing keeps the lock until its last process has ended. The file stays: if it was removed, two packings
    could lock two files of this name. Raises DataError, OSError.
    """
    path = packing.target.with_name(f".{packing.target.stem}.lock")
    if (descriptor := _open_lock(path)) is None:
        yield False
        return
    try:
        yield _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int | None:
    """Return a descriptor of the lock file, which another user may have made. Raises OSError.

    Returns None if there is no such file and the folder is read-only. Then nothing has to be protected.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file, and return whether it can be locked. Raises DataError if another packing has the lock, OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"another packing writes shards under this name, because {path} is locked; wait for it, or choose another "
            f"name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCK:
            raise
        say(
            f"{path} cannot be locked ({error.strerror}), and packing continues without a lock: do not start a second "
            f"packing under this name",
            error=True,
        )
        return False
    return True


def _same_as_before(packing: Packing) -> None:
    """Record the source and the options, or check that they equal the recorded ones. Raises DataError, OSError."""
    note = packing.target.with_suffix(".json")
    # An earlier version left an empty record if it was killed at its start.
    if note.exists() and (before := note.read_bytes()):
        _check(packing, note, before)
    elif taken := [shard for shard in map(packing.shard, packing.numbers()) if shard.exists()]:
        raise DataError(
            f"{taken[0]} exists but {note.name}, the record of its content, is missing or empty; choose another name, "
            f"or remove the shards"
        )
    else:
        write_atomically(note, json.dumps(_record(packing), indent=2) + "\n")
        sync(note.parent)  # After a power loss, no shard exists without its record.


def _sweep(packing: Packing) -> None:
    """Remove the temporary files of interrupted packings under this name, by this version or an earlier one.

    The caller has the lock: without it, they may be files that another packing is writing.
    """
    name = re.escape(packing.target.stem)
    files = rf"({name}-\d{{5,}}\.tar|\.{name}-\d{{5,}}\.tar\.jsonl|{name}\.json|{name}\.bad_samples\.jsonl)"
    temporary = re.compile(rf"\.{files}(\.[0-9a-f]+)?\.tmp")
    for left in packing.target.parent.iterdir():
        if temporary.fullmatch(left.name):
            with suppress(OSError):  # The folder is read-only, or keeps the files of another user.
                left.unlink()


_OPTIONAL = ("range", "lossless")
"""Keys of a record that are absent if the option was not given."""


def _record(packing: Packing) -> dict[str, Any]:
    """Return the source and the options of a packing."""
    now = {
        "source": packing.source.fingerprint,
        "samples": len(packing.source),
        "samples_of_a_shard": packing.samples,
        "shortest_side": packing.shortest,
        "max_pixels": packing.max_pixels,
        "classes": packing.source.classes,
    }
    given = {"range": packing.white, "lossless": packing.lossless or None}
    return now | {key: value for key, value in given.items() if value is not None}


def _check(packing: Packing, note: Path, text: bytes) -> None:
    """Raise DataError unless the record in `text` is one of this packing."""
    now = _record(packing)
    try:
        before = json.loads(text)
        changed = [key for key in now if key not in _OPTIONAL and before[key] != now[key]]
        changed += [key for key in _OPTIONAL if before.get(key) != now.get(key)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{note} exists and is not the record of a packing, or is damaged; choose another name, or remove it and "
            f"its shards"
        ) from error
    if changed:
        raise DataError(
            f"{note} records other shards under this name ({', '.join(changed)} differ); choose another name, or "
            f"remove it and its shards"
        )


def _write_shard(packing: Packing, number: int) -> None:
    shard, source, bad = packing.shard(number), packing.source, list[BadSample]()
    first = number * packing.samples
    with _replacing(shard) as temporary:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(first, min(first + packing.samples, len(source))):
                    try:
                        ending, data = _packed(packing, i)
                    except BadImage as error:
                        bad.append(BadSample(i, source.path(i), str(error)))
                        continue
                    _add(tar, f"{i:09}.{ending}", data)
                    if source.labels is not None:
                        _add(tar, f"{i:09}.cls", b"%d" % source.labels[i])
            file.flush()
            os.fsync(file.fileno())
        # The list is written first: if the shard exists, so does the list.
        write_atomically(packing.left_out(number), _lines(bad))


def _packed(packing: Packing, i: int) -> tuple[str, bytes]:
    """Return the extension and the bytes of a sample. Raises BadImage."""
    try:
        data = packing.source.read(i)
    except OSError as error:
        raise BadImage(why(error)) from error
    ending = _ENDINGS.get(format_of(data, packing.max_pixels), "jpg")
    if packing.lossless:
        return ending, transcoded(data, packing.max_pixels)
    if packing.shortest is None:
        return ending, data
    image = whole(data, packing.max_pixels, packing.white)
    scale = packing.shortest / min(image.size)
    if scale >= 1:
        return ending, data
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if max(size) > _LONGEST_SIDE:
        raise BadImage(f"resized it has {size[1]} x {size[0]} pixels; a side of a JPEG has at most {_LONGEST_SIDE:,}")
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return "jpg", file.getvalue()


def transcoded(data: bytes, max_pixels: int) -> bytes:
    """Return a plain JPEG transcoded: the same pixels and EXIF, one baseline scan, restart markers between columns.

    Other images, and JPEGs that are damaged or would lose something, are returned as they are. Raises BadImage.
    """
    before = look(data, max_pixels)
    made = jpeg.transcoded(data) if before.orientation is not None else None
    if made is None or jpeg.header(made) != (before.height, before.width, before.orientation):
        return data
    try:
        whole = (simplejpeg.decode_jpeg(each, "RGB", strict=True) for each in (data, made))
        return made if np.array_equal(*whole) else data
    except ValueError:
        return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _gather(packing: Packing) -> int:
    """Merge the lists of the shards into one, in the order of ids. Returns its length."""
    joined = packing.target.with_suffix(".bad_samples.jsonl")
    parts = {number: part for number in packing.numbers() if (part := packing.left_out(number)).exists()}
    # Keep the entries that were merged before, except those of shards that were written again.
    before = (
        [sample for sample in _read(joined) if sample.id // packing.samples not in parts] if joined.exists() else []
    )
    bad = {sample.id: sample for sample in [*before, *(sample for part in parts.values() for sample in _read(part))]}
    if parts or not joined.exists():  # Otherwise nothing has changed, and the folder may be read-only.
        write_atomically(joined, _lines([bad[i] for i in sorted(bad)]))
    for part in parts.values():
        part.unlink(missing_ok=True)
    return len(bad)


def _read(path: Path) -> list[BadSample]:
    return [BadSample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(bad: list[BadSample]) -> str:
    return "".join(json.dumps(sample._asdict()) + "\n" for sample in bad)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which no other process uses, for a file that replaces `path` at the end.

    The file is removed if an exception is raised. Files of other packings stay, however old: one that waits for slow
    storage is not over.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
