"""`mimae data pack`: a source as tar shards, its images as they are or made smaller.

Shard k holds samples k S to (k + 1) S - 1. Each is written beside its name and moved there when it is whole, so that a
stopped packing goes on with the shards that are missing; what they are packed from, and how, stands in a file beside
them and has to be the same then.
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mimae.data.loading.batch import BadSample, DataError
from mimae.data.loading.processes import over
from mimae.data.pixels.decode import BadImage, format_of, whole, why
from mimae.data.sources.base import Source

QUALITY = 95
"""Of the JPEGs that images are resized to."""

_LONGEST_SIDE = 65_500
"""Of an image that libjpeg writes."""

_ENDINGS = {"PNG": "png", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp"}
"""Of all others jpg: it says that the member is an image, and a reader goes by the bytes."""


class Packing(NamedTuple):
    """What is packed and how."""

    source: Source
    target: Path
    """DIR/NAME.tar, for the shards DIR/NAME-00000.tar and so on."""
    samples: int
    """Of a shard."""
    shortest: int | None
    """Pixels of the shortest side; images that are no larger stay as they are, and with None all do."""
    max_pixels: int
    white: int | None = None
    """data.range, for images that are made smaller."""

    def shard(self, number: int) -> Path:
        # As wide as the last one, so that their names sort as they follow one another.
        width = max(5, len(str(self.numbers()[-1])))
        return self.target.with_name(f"{self.target.stem}-{number:0{width}}.tar")

    def left_out(self, number: int) -> Path:
        """The list of the samples that a shard leaves out, until all shards are there."""
        return self.target.with_name(f".{self.shard(number).name}.jsonl")

    def numbers(self) -> range:
        return range(-(-len(self.source) // self.samples))


def pack(packing: Packing, workers: int) -> tuple[int, int]:
    """Writes the shards that are missing; returns how many these were, and how many samples all shards leave out.

    Samples that cannot be used keep their number out of the shards and are listed in DIR/NAME.bad_samples.jsonl. Raises
    DataError.
    """
    try:
        packing.target.parent.mkdir(parents=True, exist_ok=True)
        _same_as_before(packing)
        _sweep(packing)
        missing = [number for number in packing.numbers() if not packing.shard(number).exists()]
        for _ in over(missing, _write_shard, packing, workers=workers, title="packing"):
            pass
        return len(missing), _gather(packing)
    except OSError as error:
        raise DataError(
            f"packing into {packing.target.parent} failed: {error.strerror or error}. Whole shards stay; the same "
            f"command goes on with the others"
        ) from error


def _same_as_before(packing: Packing) -> None:
    """Writes down what is packed, or refuses to go on with anything else. Raises DataError, OSError."""
    note = packing.target.with_suffix(".json")
    now = {
        "source": packing.source.fingerprint,
        "samples": len(packing.source),
        "samples_of_a_shard": packing.samples,
        "shortest_side": packing.shortest,
        "max_pixels": packing.max_pixels,
        "classes": packing.source.classes,
    }
    if packing.white is not None:
        now["range"] = packing.white
    if note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
            changed = [key for key in now if key != "range" and before[key] != now[key]]
            changed += ["range"] if before.get("range") != packing.white else []
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{note} is there already and no note of a packing; choose another name") from error
        if changed:
            raise DataError(
                f"{note} tells of other shards under this name ({', '.join(changed)} differ); choose another name, or "
                f"remove it and its shards"
            )
    elif taken := [shard for shard in map(packing.shard, packing.numbers()) if shard.exists()]:
        raise DataError(
            f"{taken[0]} is there already and {note.name}, which would tell what it holds, is not; choose another name"
        )
    else:
        _write(note, json.dumps(now, indent=2) + "\n")


def _write_shard(packing: Packing, number: int) -> None:
    shard, source, bad = packing.shard(number), packing.source, list[BadSample]()
    first = number * packing.samples
    temporary = _temporary(shard)
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
    # Before the shard, whose being there says that both are.
    _write(packing.left_out(number), _lines(bad))
    temporary.replace(shard)


def _packed(packing: Packing, i: int) -> tuple[str, bytes]:
    """The ending and the bytes of a sample. Raises BadImage."""
    try:
        data = packing.source.read(i)
    except OSError as error:
        raise BadImage(why(error)) from error
    ending = _ENDINGS.get(format_of(data, packing.max_pixels), "jpg")
    if packing.shortest is None:
        return ending, data
    image = whole(data, packing.max_pixels, packing.white)
    scale = packing.shortest / min(image.size)
    if scale >= 1:
        return ending, data
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if max(size) > _LONGEST_SIDE:
        raise BadImage(f"made smaller it has {size[1]} x {size[0]} pixels; a JPEG has {_LONGEST_SIDE:,} a side at most")
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return "jpg", file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _gather(packing: Packing) -> int:
    """Joins the lists of the shards into one, in the order of ids; returns its length."""
    joined = packing.target.with_suffix(".bad_samples.jsonl")
    parts = {number: part for number in packing.numbers() if (part := packing.left_out(number)).exists()}
    # With what was joined before, but for the shards that are written anew.
    before = (
        [sample for sample in _read(joined) if sample.id // packing.samples not in parts] if joined.exists() else []
    )
    bad = {sample.id: sample for sample in [*before, *(sample for part in parts.values() for sample in _read(part))]}
    _write(joined, _lines([bad[i] for i in sorted(bad)]))
    for part in parts.values():
        part.unlink(missing_ok=True)
    return len(bad)


def _read(path: Path) -> list[BadSample]:
    return [BadSample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(bad: list[BadSample]) -> str:
    return "".join(json.dumps(sample._asdict()) + "\n" for sample in bad)


def _temporary(path: Path) -> Path:
    """Of this process alone, so that two packings of one target do not write into one file."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sweep(packing: Packing) -> None:
    """Removes what stopped packings have left half written."""
    for left in packing.target.parent.glob(f".{glob.escape(packing.target.stem)}*.*.tmp"):
        pid = left.name.split(".")[-2]
        try:
            if pid.isdigit():
                os.kill(int(pid), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except PermissionError:  # Another user's, and running.
            pass


def _write(path: Path, text: str) -> None:
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
