"""Parquet files as Hugging Face writes them: a column of image bytes and, where there is one, a column of classes.

A row group is read whole, and a process keeps KEPT_BYTES of them. Samples are cheap while what is gone through in
random order fits in there: the whole set in a full shuffle, a group of 16,384 samples with `data.shuffle=blocks`.
Beyond that row groups are read many times over, and the set is better packed into tar shards (`mimae data pack`).
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.sources.index import STAMPS, Index, IndexedSource, end_to_end, read_all

KEPT_BYTES = 256 << 20
"""Bytes of row groups that a process keeps at most, and at least one row group."""

_IMAGES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "cls", "fine_label")


class ParquetSource(IndexedSource):
    """The rows of Parquet files, in the order of the files and of their rows."""

    def __init__(self, name: str, files: Sequence[Path], index: Index) -> None:
        _need_pyarrow()  # An index from the cache has not asked for it.
        super().__init__(name, index)
        self._files = list(files)

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
        rows = _kept.get(self._files[file], (changed, size), number)
        data = rows[i - int(places["starts"][group])].as_py()
        if data is None:
            raise OSError("the row holds no image bytes")
        return data

    def _group(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self.blocks, i, "right")) - 1


class _Kept:
    """The row groups that were read last, up to KEPT_BYTES of them."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, tuple[int, int], int], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, stamp: tuple[int, int], number: int) -> Any:
        """The column of images of a row group. Raises OSError."""
        key = (path, stamp, number)
        with self._lock:
            if key not in self._groups:
                rows = _row_group(path, stamp, number)
                self._bytes += rows.nbytes
                while self._groups and self._bytes > KEPT_BYTES:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
                self._groups[key] = rows
            self._groups.move_to_end(key)
            return self._groups[key]


_kept = _Kept()


def _row_group(path: Path, stamp: tuple[int, int], number: int) -> Any:
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    if _stamp(path) != stamp:
        raise OSError("the file has changed since the run began")
    try:
        with _open(path) as file:
            column = _columns(file).image
            rows = file.read_row_group(number, columns=[column], use_threads=False)
            return _leaf(rows, column)
    except ArrowException as error:
        raise OSError(" ".join(str(error).split())) from error


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _open(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    return ParquetFile(path)


# The index


def read_footers(files: Sequence[Path]) -> Index:
    """The index of Parquet files. Raises DataError."""
    _need_pyarrow()
    found = read_all("Parquet files", files, _footer_or_reason)
    if not sum(len(file.lengths) for file in found):
        raise DataError(f"{files[0].parent}: the Parquet files hold no rows")
    labels = [file.labels for file in found if file.labels is not None]
    classes = found[0].classes
    if any(file.classes != classes for file in found):
        raise DataError(f"the class names of {files[0]} and those of other files differ; give files of one data set")
    return Index(
        np.frombuffer(b"".join(file.names for file in found), np.uint8),
        end_to_end(np.concatenate([file.lengths for file in found])),
        np.concatenate(labels) if len(labels) == len(found) else None,
        classes,
        [os.fsencode(file) for file in files],
        {
            "starts": end_to_end(np.concatenate([file.rows for file in found])),
            "file": np.repeat(np.arange(len(found)), [len(file.rows) for file in found]),
            "bytes": np.concatenate([file.bytes for file in found]),
            STAMPS: np.array([file.stamp for file in found], np.int64),
        },
    )


def _need_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise DataError("Parquet files are read by pyarrow, which is not installed: pip install 'mimae[parquet]'")


class _Columns(NamedTuple):
    """Dotted names of the columns; the class names if the file tells them."""

    image: str
    path: str | None
    label: str | None
    classes: list[str] | None


class _Footer(NamedTuple):
    """What the index takes from one file; `rows` and `bytes` are of its row groups."""

    names: bytes
    lengths: np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None
    rows: np.ndarray
    bytes: np.ndarray
    stamp: tuple[int, int]


def _footer_or_reason(path: Path) -> _Footer | str:
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    try:
        return _read_footer(path)
    except (OSError, ValueError, ArrowException) as error:
        return " ".join(str(error).split())


def _read_footer(path: Path) -> _Footer:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    stamp = _stamp(path)
    with _open(path) as file:
        columns = _columns(file)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        names, lengths = b"", np.zeros(file.metadata.num_rows, np.int64)
        if columns.path is not None:
            column = _leaf(file.read([columns.path], use_threads=False), columns.path)
            given = pc.fill_null(column.cast(pa.large_binary()), b"")
            lengths = pc.binary_length(given).to_numpy().astype(np.int64)
            names = b"".join(given.to_pylist())
        labels = None
        if columns.label is not None:
            column = _leaf(file.read([columns.label], use_threads=False), columns.label)
            if not column.null_count:
                labels = column.to_numpy().astype(np.int64)
        rows = np.array([group.num_rows for group in groups], np.int64)
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
    if labels is not None and len(labels) and labels.min() < 0:  # How Hugging Face marks samples without a class.
        labels = None
    return _Footer(names, lengths, labels, columns.classes, rows, sizes, stamp)


def _columns(file: Any) -> _Columns:
    """Which columns hold images and classes: by Hugging Face's own notes in the file, else by type and name."""
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    schema = file.schema_arrow
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    # Every level may be null, or something else.
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
    plain = [field.name for field in schema if is_bytes(field.type) and field.name in _IMAGES]
    noted = [name for name in feature("Image") if name in structs]
    if not (images := noted + structs + plain):
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"it has no column of image bytes; its columns are {listed}")
    label = [
        name
        for name in (*feature("ClassLabel"), *_LABELS)
        if name in schema.names and kinds.is_integer(schema.field(name).type)
    ]
    classes = features.get(label[0], {}).get("names") if label else None
    if images[0] not in structs:
        return _Columns(images[0], None, label[0] if label else None, classes)
    inner = {field.name: field.type for field in schema.field(images[0]).type.fields}
    path = f"{images[0]}.path" if "path" in inner and kinds.is_string(inner["path"]) else None
    return _Columns(f"{images[0]}.bytes", path, label[0] if label else None, classes)


def _inner(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _leaf(table: Any, dotted: str) -> Any:
    """The one column of a table that was read by a dotted name, out of its struct."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    column = table.column(0)
    # The name of the column itself may have dots.
    return pc.struct_field(column, dotted.rpartition(".")[2]) if kinds.is_struct(column.type) else column
