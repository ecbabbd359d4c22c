"""Parquet files as Hugging Face writes them: a column of image bytes and, where there is one, a column of classes.

A row group is read whole, piece by piece, and a process keeps KEPT_BYTES of them. Samples are cheap while what is gone
through in random order fits in there: the whole set in a full shuffle, a group of 16,384 samples with
`data.shuffle=blocks`.
Beyond that row groups are read many times over, and the set is better packed into tar shards (`mimae data pack`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources.columns import find_columns, is_text
from mimae.data.sources.index import STAMPS, Index, IndexedSource, end_to_end, read_all
from mimae.data.sources.pages import Chunk, read_chunks, unpacked_size
from mimae.outside.reading import open_regular
from mimae.outside.text import printable

KEPT_BYTES = 256 << 20
"""Bytes of row groups that a process keeps at most, and at least one row group."""

MOST_ROWS = 1_000_000
"""Rows of a file that may take less than a byte each: what a footer claims costs memory before anything is read."""

MOST_FOOTER = 64 << 20
"""Bytes of a footer."""

MOST_EXPANDED = 1000
"""Bytes that a byte of a compressed column becomes at most, beyond KEPT_BYTES; images hardly compress."""

_ROWS_AT_ONCE = 1 << 14
_ROUNDING = 1 << 20
"""Bytes by which pages may be larger than their footer says: writers count differently."""


class ParquetSource(IndexedSource):
    """The rows of Parquet files, in the order of the files and of their rows."""

    def __init__(self, name: str, files: Sequence[Path], index: Index, settings: DataSettings) -> None:
        _need_pyarrow()  # An index from the cache has not asked for it.
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
    """The row groups that were read last, up to KEPT_BYTES of them."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, tuple[int, int], int, str | None], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, stamp: tuple[int, int], number: int, image_key: str | None) -> Any:
        """Return the column of images of a row group. Raises OSError."""
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
    """The column of images of a row group, read piece by piece: what its pages expand to is known only then."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if _stamp(path) != stamp:
        raise OSError("the file has changed since the run began")
    try:
        with _open(path) as file:
            column = find_columns(file, DataSettings(image_key=image_key)).image
            told = _chunk(path, number, column).unpacked
            _check_pages(path, file, [number], column)
            return _read(path, file, [number], column, KEPT_BYTES + 2 * told)
    except pa.ArrowException as error:
        raise OSError(" ".join(str(error).split())) from error


def _read(path: Path, file: Any, groups: list[int], dotted: str, limit: int) -> Any:
    """A column of row groups, read piece by piece: a dictionary of one value may stand for millions of rows.

    Raises OSError where it takes more than `limit` bytes, or has other rows than the footer claims.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    largest = max((_chunk(path, group, dotted).unpacked for group in groups), default=0)
    expected = sum(file.metadata.row_group(group).num_rows for group in groups)
    # A value is no larger than its column in the file, unpacked.
    at_once = max(1, min(_ROWS_AT_ONCE, KEPT_BYTES // max(1, largest)))
    pieces, read = [], 0
    for batch in file.iter_batches(at_once, groups, [dotted], use_threads=False):
        pieces.append(_leaf(batch, dotted))
        read += pieces[-1].nbytes
        if read > limit:
            raise OSError(f"column {dotted} expands to more than the {limit:,} bytes that its size in the file allows")
    if (rows := sum(map(len, pieces))) != expected:
        raise OSError(f"column {dotted} has {rows:,} rows, its footer claims {expected:,}")
    if pieces:
        return pa.chunked_array(pieces)
    return _leaf(file.schema_arrow.empty_table().select([dotted.partition(".")[0]]), dotted)


@lru_cache(8)
def _chunks(path: Path, stamp: tuple[int, int]) -> list[dict[str, Chunk]]:
    """The columns of each row group of a file that has this stamp. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = _footer_bytes(file, size)
        file.seek(size - 8 - length)
        return read_chunks(file.read(length))


def _chunk(path: Path, group: int, dotted: str) -> Chunk:
    """Return the footer's entry for a column in a row group. Raises OSError if it is impossible."""
    groups = _chunks(path, _stamp(path))
    if group >= len(groups) or dotted not in groups[group]:
        raise OSError(f"its row group {group} has no column {dotted}, which its schema lists")
    chunk = groups[group][dotted]
    if chunk.packed < 0 or chunk.unpacked < 0 or chunk.unpacked > KEPT_BYTES + MOST_EXPANDED * chunk.packed:
        raise OSError(
            f"row group {group} claims that {chunk.packed:,} bytes of column {dotted} become {chunk.unpacked:,}"
        )
    return chunk


def _check_pages(path: Path, file: Any, groups: Sequence[int], dotted: str) -> None:
    """Raise OSError where the pages of a column claim more than the footer does."""
    with open(open_regular(path), "rb", buffering=0) as raw:
        for group in groups:
            if not file.metadata.row_group(group).num_rows:
                continue
            chunk = _chunk(path, group, dotted)
            claimed = unpacked_size(raw.fileno(), chunk.start, chunk.packed)
            if claimed > 2 * chunk.unpacked + _ROUNDING:
                raise OSError(f"the pages of column {dotted} claim {claimed:,} bytes, its footer {chunk.unpacked:,}")


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _open(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        _footer_bytes(file, file.seek(0, os.SEEK_END))
    # Reading through a buffer avoids holding all compressed bytes of a column in addition to the decompressed ones.
    return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _footer_bytes(file: BinaryIO, size: int) -> int:
    """Return the length of the footer of a file of `size` bytes. Raises OSError where it has none."""
    file.seek(max(0, size - 8))
    end = file.read(8)
    if len(end) < 8 or not end.endswith((b"PAR1", b"PARE")):
        raise OSError("it is not a Parquet file: it does not end in PAR1; is it complete?")
    if (footer := int.from_bytes(end[:4], "little")) > min(MOST_FOOTER, size - 8):
        raise OSError(f"its footer claims {footer:,} bytes; the file has {size:,}, a footer at most {MOST_FOOTER:,}")
    return footer


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
        _notes(files, found, labels, classes) if settings.index_version > 1 else [],
    )


def _labels(files: Sequence[Path], found: Sequence[_Footer]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the classes of all files, where each has them, and their names. Raises DataError where they differ.

    Names are not used where a class has no name, since they are then those of other classes.
    """
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
    if not whole:
        return None, classes
    every = np.concatenate(labels)
    return every, None if classes is not None and every.max(initial=-1) >= len(classes) else classes


def _notes(
    files: Sequence[Path], found: Sequence[_Footer], labels: np.ndarray | None, classes: list[str] | None
) -> list[str]:
    notes = [
        f"no sample has a class: {one.dropped} ({printable(file.name)})"
        for file, one in zip(files, found)
        if one.dropped
    ]
    without = [file for file, one in zip(files, found) if one.labels is None and not one.dropped]
    if 0 < len(without) < len(found):
        notes.append(
            f"no sample has a class, since {len(without):,} of {len(found):,} files have no column of classes, for "
            f"example {printable(without[0].name)}"
        )
    if labels is not None and classes is None and (names := found[0].classes) is not None:
        notes.append(
            f"the class names in the files are not used: there are {len(names):,}, and the largest class number is "
            f"{labels.max():,}"
        )
    largest = max(found, key=lambda file: file.largest)
    if largest.largest > KEPT_BYTES:
        file = files[found.index(largest)]
        notes.append(
            f"row groups hold up to {largest.largest / 1e6:,.0f} MB of images ({printable(file.name)}), more than the "
            f"{KEPT_BYTES / 1e6:,.0f} MB that a worker keeps: each worker takes about {2 * largest.largest / 1e6:,.0f} "
            f"MB to read one, again and again with data.shuffle=full. Fewer data.workers and data.shuffle=blocks "
            f"help; mimae data pack makes shards, which cost nothing of that"
        )
    return notes[:1] + notes[-1:] if len(notes) > 1 else notes


def _need_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise DataError("Parquet files are read by pyarrow, which is not installed: pip install 'mimae[parquet]'")


class _Footer(NamedTuple):
    """Entries of the index from one file; `rows` and `bytes` have a value per row group."""

    names: bytes
    lengths: np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None
    rows: np.ndarray
    bytes: np.ndarray
    stamp: tuple[int, int]
    texts: list[str] | None
    """Names that `labels` are indices of, if classes are names in the file."""
    dropped: str
    largest: int
    """Bytes of images in its largest row group."""


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
        columns = find_columns(file, settings)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], np.int64)
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
        _check_rows(file.metadata.num_rows, rows, stamp[1])
        largest = max((_chunk(path, i, columns.image).unpacked for i in range(len(groups))), default=0)
        names, lengths = b"", np.zeros(file.metadata.num_rows, np.int64)
        if columns.path is not None:
            column = _read_column(path, file, columns.path)
            given = pc.fill_null(column.cast(pa.large_binary()), b"")
            lengths = pc.binary_length(given).to_numpy().astype(np.int64)
            names = b"".join(given.to_pylist())
        labels, texts, dropped = None, None, columns.dropped
        if columns.label is not None:
            labels, texts, dropped = _classes(_read_column(path, file, columns.label), columns.label)
    return _Footer(names, lengths, labels, columns.classes, rows, sizes, stamp, texts, dropped, largest)


def _check_rows(total: int, rows: np.ndarray, size: int) -> None:
    """Raise ValueError where the numbers of rows that a footer claims cannot be."""
    if (rows < 0).any() or total != sum(rows.tolist()):
        raise ValueError(f"its footer claims {total:,} rows and row groups that do not add up to them")
    if total > max(MOST_ROWS, size):
        raise ValueError(f"its footer claims {total:,} rows in {size:,} bytes, which cannot be images")


def _read_column(path: Path, file: Any, dotted: str) -> Any:
    """A small column of all rows. Raises OSError where it is none."""
    groups = list(range(file.metadata.num_row_groups))
    _check_pages(path, file, groups, dotted)
    return _read(path, file, groups, dotted, max(KEPT_BYTES, 100 * file.metadata.num_rows))


def _classes(column: Any, name: str) -> tuple[np.ndarray | None, list[str] | None, str]:
    """Return the classes in a column, their names where they are text, and why they are not used."""
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    if column.null_count:
        return None, None, f"column {name} is null in {column.null_count:,} of {len(column):,} rows"
    if is_text(column.type):
        coded = column.combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if hasattr(coded, "combine_chunks") else coded
        return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist(), ""
    labels = column.to_numpy() if not kinds.is_boolean(column.type) else np.array(column.to_pylist(), np.int64)
    # Hugging Face marks samples without a class by -1. A large unsigned number has no place in int64.
    strange = (labels < 0) | (labels > np.iinfo(np.int64).max)
    if strange.any():
        return None, None, f"column {name} is {labels[strange][0]} in {int(strange.sum()):,} of {len(labels):,} rows"
    return labels.astype(np.int64), None, ""


def _leaf(table: Any, dotted: str) -> Any:
    """The one column of a table that was read by a dotted name, out of its struct."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    column = table.column(0)
    # The name of the column itself may have dots, and that of a field in it too.
    return pc.struct_field(column, dotted.rpartition(".")[2]) if kinds.is_struct(column.type) else column
