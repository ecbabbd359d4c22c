"""Parquet files as Hugging Face writes them: a column of image bytes and, optionally, a column of classes.

A row group is read as a whole, piece by piece, and a process caches KEPT_BYTES of row groups. Reading is cheap if the
samples that are read in random order fit into this cache: the whole set with a full shuffle, or a group of 16,384
samples with `data.shuffle=blocks`. Otherwise row groups are read many times, and it is better to pack the set into tar
shards (`mimae data pack`).
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources.index import STAMPS, Index, IndexedSource, end_to_end, read_all
from mimae.outside.reading import open_regular
from mimae.outside.text import printable

KEPT_BYTES = 256 << 20
"""Largest number of bytes of row groups that a process caches; it always caches at least one row group."""

MOST_ROWS = 1_000_000
"""Number of rows up to which a file may have less than one byte per row. The index allocates memory for the number of
rows that a footer claims, before any row is read."""

MOST_FOOTER = 64 << 20
"""Largest size of a footer in bytes."""

MOST_EXPANDED = 1000
"""Largest expansion of a compressed column larger than KEPT_BYTES, as a factor; images hardly compress."""

_ROWS_AT_ONCE = 64
_IMAGES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "cls", "fine_label")


class ParquetSource(IndexedSource):
    """The rows of Parquet files, file by file and row by row."""

    def __init__(self, name: str, files: Sequence[Path], index: Index, settings: DataSettings) -> None:
        _need_pyarrow()  # An index from the cache was loaded without pyarrow.
        super().__init__(name, index, settings.max_bytes)
        self._files, self._image_key = list(files), settings.image_key

    @property
    def blocks(self) -> np.ndarray:
        return self.index.places["starts"]

    def path(self, i: int) -> str:
        places, group = self.index.places, self._group(i)
        first = int(np.searchsorted(places["file"], places["file"][group]))
        row, name = i - int(places["starts"][first]), os.fsdecode(self.index.name(i))
        return f"{self._files[places['file'][group]]}, row {row}" + (f" ({name})" if name else "")

    def read(self, i: int) -> bytes:
        places, group = self.index.places, self._group(i)
        file = int(places["file"][group])
        number = group - int(np.searchsorted(places["file"], file))
        changed, size = map(int, places[STAMPS][file])
        rows = _kept.get(self._files[file], (changed, size), number, self._image_key)
        data = rows[i - int(places["starts"][group])]
        if not data.is_valid:
            raise OSError("the row has no image bytes")
        buffer = data.as_buffer()
        self.check_size(buffer.size)
        return buffer.to_pybytes()

    def _group(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self.blocks, i, "right")) - 1


class _Kept:
    """Cache of the most recently used row groups, up to KEPT_BYTES."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, tuple[int, int], int, str | None], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, stamp: tuple[int, int], number: int, image_key: str | None) -> Any:
        """Return the image column of a row group. Raises OSError."""
        key = (path, stamp, number, image_key)
        with self._lock:
            if key not in self._groups:
                rows = _row_group(*key)
                self._bytes += rows.nbytes
                while self._groups and self._bytes > KEPT_BYTES:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
                self._groups[key] = rows
            self._groups.move_to_end(key)
            return self._groups[key]


_kept = _Kept()


def _row_group(path: Path, stamp: tuple[int, int], number: int, image_key: str | None) -> Any:
    """Read the image column of a row group, piece by piece: only then it is known how far its pages expand."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if _stamp(path) != stamp:
        raise OSError("the file has changed since the run began")
    try:
        with _open(path) as file:
            column = _columns(file, DataSettings(image_key=image_key)).image
            limit, read = KEPT_BYTES + 2 * _chunk(file, number, column).total_uncompressed_size, 0
            pieces = []
            for batch in file.iter_batches(_ROWS_AT_ONCE, [number], [column], use_threads=False):
                pieces.append(_leaf(batch, column))
                read += pieces[-1].nbytes
                if read > limit:
                    raise OSError(f"row group {number} has more than the {limit:,} bytes that its footer allows")
            return pa.chunked_array(pieces)
    except pa.ArrowException as error:
        raise OSError(" ".join(str(error).split())) from error


def _chunk(file: Any, group: int, dotted: str) -> Any:
    """Return the footer's metadata of a column in a row group. Raises OSError if it is implausible."""
    columns = file.metadata.row_group(group)
    chunk = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == dotted)
    packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
    if packed < 0 or unpacked < 0 or unpacked > KEPT_BYTES + MOST_EXPANDED * packed:
        raise OSError(f"row group {group} claims that {packed:,} bytes of images become {unpacked:,}")
    return chunk


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _open(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
    if len(end) < 8 or not end.endswith((b"PAR1", b"PARE")):
        raise OSError("it is not a Parquet file: it does not end in PAR1; is it complete?")
    if (footer := int.from_bytes(end[:4], "little")) > min(MOST_FOOTER, size):
        raise OSError(f"its footer claims {footer:,} bytes; the file has {size:,}, a footer at most {MOST_FOOTER:,}")
    # Reading through a buffer avoids holding all compressed bytes of a column in addition to the decompressed ones.
    return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


# The index


def read_footers(files: Sequence[Path], settings: DataSettings) -> Index:
    """Return the index of Parquet files. Raises DataError."""
    _need_pyarrow()
    found = read_all("Parquet files", files, partial(_footer_or_reason, settings))
    if not sum(len(file.lengths) for file in found):
        raise DataError(f"{printable(str(files[0].parent))}: the Parquet files hold no rows")
    labels, classes = _labels(files, found)
    return Index(
        np.frombuffer(b"".join(file.names for file in found), np.uint8),
        end_to_end(np.concatenate([file.lengths for file in found])),
        labels,
        classes,
        [os.fsencode(file) for file in files],
        {
            "starts": end_to_end(np.concatenate([file.rows for file in found])),
            "file": np.repeat(np.arange(len(found)), [len(file.rows) for file in found]),
            "bytes": np.concatenate([file.bytes for file in found]),
            STAMPS: np.array([file.stamp for file in found], np.int64),
        },
        _notes(files, found) if settings.index_version > 1 else [],
    )


def _labels(files: Sequence[Path], found: Sequence[_Footer]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the classes, if every file has them, and their names. Raises DataError if the files' classes differ."""
    classes = found[0].classes
    labels = [file.labels for file in found if file.labels is not None]
    whole = len(labels) == len(found)
    texts = [file.texts for file in found if file.texts is not None]
    if any(file.classes != classes for file in found) or (whole and 0 < len(texts) < len(found)):
        first = printable(str(files[0]))
        raise DataError(f"the class names of {first} and those of other files differ; give files of one data set")
    if whole and texts:
        classes = sorted({name for names in texts for name in names})
        number = {name: i for i, name in enumerate(classes)}
        labels = [np.array([number[name] for name in names], np.int64)[codes] for names, codes in zip(texts, labels)]
    return np.concatenate(labels) if whole else None, classes


def _notes(files: Sequence[Path], found: Sequence[_Footer]) -> list[str]:
    notes = [
        f"no sample has a class: {one.dropped} ({printable(file.name)})"
        for file, one in zip(files, found)
        if one.dropped
    ]
    largest = max(found, key=lambda file: file.largest)
    if largest.largest > KEPT_BYTES:
        file = files[found.index(largest)]
        notes.append(
            f"row groups hold up to {largest.largest / 1e6:,.0f} MB of images ({printable(file.name)}), more than the "
            f"{KEPT_BYTES / 1e6:,.0f} MB that a worker keeps: each worker takes about {2 * largest.largest / 1e6:,.0f} "
            f"MB to read one, again and again with data.shuffle=full. Fewer data.workers and data.shuffle=blocks "
            f"help; tar shards (mimae data pack) avoid it"
        )
    return notes[:1] + notes[-1:] if len(notes) > 1 else notes


def _need_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise DataError("Parquet files are read by pyarrow, which is not installed: pip install 'mimae[parquet]'")


class _Columns(NamedTuple):
    """Dotted names of the columns, and the class names if the file has them."""

    image: str
    path: str | None
    label: str | None
    classes: list[str] | None
    dropped: str = ""
    """Why a column that seems to hold classes is not used."""


class _Footer(NamedTuple):
    """The part of the index that comes from one file. `rows` and `bytes` have one entry per row group."""

    names: bytes
    lengths: np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None
    rows: np.ndarray
    bytes: np.ndarray
    stamp: tuple[int, int]
    texts: list[str] | None
    """Class names that `labels` index, if the file stores its classes as names."""
    dropped: str
    largest: int
    """Size of the images in the largest row group in bytes."""


def _footer_or_reason(settings: DataSettings, path: Path) -> _Footer | str:
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    try:
        return _read_footer(path, settings)
    except (OSError, ValueError, ArrowException) as error:
        return " ".join(str(error).split())


def _read_footer(path: Path, settings: DataSettings) -> _Footer:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    stamp = _stamp(path)
    with _open(path) as file:
        columns = _columns(file, settings)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], np.int64)
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
        _check_rows(file.metadata.num_rows, rows, stamp[1])
        largest = max((_chunk(file, i, columns.image).total_uncompressed_size for i in range(len(groups))), default=0)
        names, lengths = b"", np.zeros(file.metadata.num_rows, np.int64)
        if columns.path is not None:
            column = _read_column(file, columns.path)
            given = pc.fill_null(column.cast(pa.large_binary()), b"")
            lengths = pc.binary_length(given).to_numpy().astype(np.int64)
            names = b"".join(given.to_pylist())
        labels, texts, dropped = None, None, columns.dropped
        if columns.label is not None:
            labels, texts, dropped = _classes(_read_column(file, columns.label), columns.label)
    return _Footer(names, lengths, labels, columns.classes, rows, sizes, stamp, texts, dropped, largest)


def _check_rows(total: int, rows: np.ndarray, size: int) -> None:
    """Raise ValueError if the numbers of rows that a footer claims are impossible."""
    if (rows < 0).any() or total != sum(rows.tolist()):
        raise ValueError(f"its footer claims {total:,} rows, but its row groups do not add up to that")
    if total > max(MOST_ROWS, size):
        raise ValueError(f"its footer claims {total:,} rows in {size:,} bytes, which cannot be images")


def _read_column(file: Any, dotted: str) -> Any:
    """Read a small column of all rows, piece by piece. Raises OSError if it takes more than KEPT_BYTES."""
    import pyarrow as pa  # type: ignore[import-untyped]

    pieces, read = [], 0
    for batch in file.iter_batches(1 << 14, columns=[dotted], use_threads=False):
        pieces.append(_leaf(batch, dotted))
        read += pieces[-1].nbytes
        if read > max(KEPT_BYTES, 100 * file.metadata.num_rows):
            raise OSError(f"its column {dotted} takes more than {read:,} bytes")
    schema = file.schema_arrow
    return (
        pa.chunked_array(pieces) if pieces else _leaf(schema.empty_table().select([dotted.partition(".")[0]]), dotted)
    )


def _classes(column: Any, name: str) -> tuple[np.ndarray | None, list[str] | None, str]:
    """Return the classes in a column, their names if they are text, and the reason if they are not used."""
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    if column.null_count:
        return None, None, f"column {name} is null in {column.null_count:,} of {len(column):,} rows"
    if _is_text(column.type):
        coded = column.combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if hasattr(coded, "combine_chunks") else coded
        return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist(), ""
    labels = (
        column.to_numpy().astype(np.int64)
        if not kinds.is_boolean(column.type)
        else np.array(column.to_pylist(), np.int64)
    )
    if len(labels) and labels.min() < 0:  # Hugging Face marks samples without a class by -1.
        return None, None, f"column {name} is {labels.min()} in {int((labels < 0).sum()):,} of {len(labels):,} rows"
    return labels, None, ""


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _columns(file: Any, settings: DataSettings) -> _Columns:
    """Return the columns of images and classes. Raises ValueError.

    They are found by `data.image_key` and `data.label_key`, else by Hugging Face's metadata in the file, else by type
    and name.
    """
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    schema = file.schema_arrow
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    # At every level the value may be null or of another type.
    features = {k: v for k, v in _inner(_inner(notes, "info"), "features").items() if isinstance(v, dict)}

    def feature(kind: str) -> list[str]:
        return [name for name, value in features.items() if value.get("_type") == kind]

    def is_bytes(kind: Any) -> bool:
        return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)

    structs = [
        field.name
        for field in schema
        if kinds.is_struct(field.type)
        and any(inner.name == "bytes" and is_bytes(inner.type) for inner in field.type.fields)
    ]
    every = [field.name for field in schema if is_bytes(field.type)]
    plain = [name for name in every if name in _IMAGES]
    noted = [name for name in feature("Image") if name in structs]
    images = noted + structs + plain
    if not images and len(every) == 1:
        images = every  # The only column of bytes must hold the images.
    if settings.image_key is not None:
        images = [
            name for name in (settings.image_key, settings.image_key.removesuffix(".bytes")) if name in structs + every
        ]
    if not images:
        raise ValueError(_no_images(schema, structs + every, settings.image_key))

    def is_class(name: str) -> bool:
        kind = schema.field(name).type
        return kinds.is_integer(kind) or (settings.index_version > 1 and (_is_text(kind) or kinds.is_boolean(kind)))

    names = (*feature("ClassLabel"), *_LABELS) if settings.label_key is None else (settings.label_key,)
    present = [name for name in names if name in schema.names]
    label = [name for name in present if is_class(name)]
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if settings.label_key is not None and not label:
        raise ValueError(
            f"data.label_key={settings.label_key} is not a column of numbers or names; its columns are {listed}"
        )
    dropped = f"column {present[0]} is of type {schema.field(present[0]).type}" if present and not label else ""
    classes = features.get(label[0], {}).get("names") if label else None
    column = label[0] if label else None
    if images[0] not in structs:
        return _Columns(images[0], None, column, classes, dropped)
    inner = {field.name: field.type for field in schema.field(images[0]).type.fields}
    path = f"{images[0]}.path" if "path" in inner and kinds.is_string(inner["path"]) else None
    return _Columns(f"{images[0]}.bytes", path, column, classes, dropped)


def _no_images(schema: Any, legal: list[str], image_key: str | None) -> str:
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if image_key is not None:
        return (
            f"data.image_key={image_key} is not a column of image bytes; "
            f"legal: {', '.join(legal) or 'none'} of {listed}"
        )
    advice = f"; data.image_key names one of {', '.join(legal)}" if legal else ""
    return f"it has no column of image bytes{advice}; its columns are {listed}"


def _inner(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _leaf(table: Any, dotted: str) -> Any:
    """Return the single column of a table that was read by a dotted name, taken out of its struct."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    column = table.column(0)
    # The names of the column and of the field may both contain dots.
    return pc.struct_field(column, dotted.rpartition(".")[2]) if kinds.is_struct(column.type) else column
