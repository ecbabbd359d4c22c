"""Files of features: parts, and the files that are made from them (npz, Parquet, a folder of safetensors).

Every writer reads one part after the other, so that memory does not grow with the number of samples. Equal parts give
equal bytes. Letters in shapes: n samples of a part, N samples of all parts.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimae.errors import UserError
from mimae.outside.files import made_beside

_TEXTS = "texts"


class Part(NamedTuple):
    """Some samples in the order of their ids."""

    ids: Tensor
    """int64 (n,)."""
    paths: list[str]
    labels: Tensor | None
    """int64 (n,): the class of each sample; None if the source has no classes."""
    columns: dict[str, Tensor]
    """Features (n, ...) by name."""
    unreadable: list[str]
    """Path and reason of each sample that has no features."""


class Table(NamedTuple):
    """The parts of an embedding, and the names of its classes."""

    parts: Sequence[Path]
    classes: list[str] | None

    def __iter__(self) -> Iterator[Part]:  # type: ignore[override]
        return map(read_part, self.parts)


def write_part(path: Path, part: Part) -> None:
    """Write a part atomically."""
    tensors = {"ids": part.ids, **part.columns} | ({} if part.labels is None else {"labels": part.labels})
    # There is only one key, because the order of several keys would change from run to run.
    texts = json.dumps({"paths": part.paths, "unreadable": part.unreadable})
    with made_beside(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {_TEXTS: texts})
        temporary.chmod(0o644)  # safetensors makes files that only the owner can read.


def read_part(path: Path) -> Part:
    """Read a part. Raises UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            texts = json.loads(file.metadata()[_TEXTS])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            ids, labels = tensors.pop("ids"), tensors.pop("labels", None)
            return Part(ids, texts["paths"], labels, tensors, texts["unreadable"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the same command makes it again") from error


def write_npz(table: Table, out: Path) -> None:
    """Write a .npz file, for `numpy.load(out)["features"]`.

    It has arrays ids (N,), paths (N,) of text, labels (N,) and classes if there are classes, and each column (N, ...).
    """
    rows, longest, first = 0, 1, next(iter(table))
    for part in table:
        rows += len(part.ids)
        longest = max(longest, *map(len, part.paths), 1)

    def blocks(get: Callable[[Part], np.ndarray]) -> Iterator[np.ndarray]:
        return (get(part) for part in table)

    with zipfile.ZipFile(out, "w") as archive:
        _member(archive, "ids", (rows,), blocks(lambda part: part.ids.numpy()))
        _member(archive, "paths", (rows,), blocks(lambda part: np.array(part.paths, f"<U{longest}")), compressed=True)
        if first.labels is not None:
            _member(archive, "labels", (rows,), blocks(lambda part: _of(part.labels)))
        if table.classes is not None:
            names = np.array(table.classes)
            _member(archive, "classes", names.shape, [names])
        for name, column in first.columns.items():
            shape = (rows, *column.shape[1:])
            _member(archive, name, shape, blocks(lambda part, name=name: part.columns[name].numpy()))  # type: ignore[misc]


def _of(labels: Tensor | None) -> np.ndarray:
    assert labels is not None, "every part of a source with classes has labels"
    return labels.numpy()


def _member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray], compressed: bool = False
) -> None:
    """Write an array of `shape`, whose rows are `blocks` in order."""
    entry = zipfile.ZipInfo(f"{name}.npy")  # The entry has no date, so the bytes are the same each time.
    entry.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with archive.open(entry, "w", force_zip64=True) as file:
        started = False
        for block in blocks:
            if not started:
                header = {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(file, header)  # type: ignore[arg-type]
                started = True
            file.write(block.tobytes())


def write_parquet(table: Table, out: Path) -> None:
    """Write a Parquet file with columns id, path, label if there are classes, and the features.

    Features are (nested) lists of fixed size. Each part is a row group. The names of the classes are in the metadata
    under `classes`, as JSON. Raises UserError if pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "Parquet files need pyarrow: pip install 'mimae[parquet]', or an --out that ends in .npz"
        ) from error

    def lists(column: Tensor) -> pa.Array:
        values = pa.array(column.numpy().reshape(-1))
        for size in reversed(column.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        return values

    def rows(part: Part) -> pa.Table:
        named = {"id": pa.array(part.ids.numpy()), "path": pa.array(part.paths, pa.string())}
        if part.labels is not None:
            named["label"] = pa.array(part.labels.numpy())
        made = pa.table(named | {name: lists(column) for name, column in part.columns.items()})
        return made.replace_schema_metadata({} if table.classes is None else {"classes": json.dumps(table.classes)})

    writer = None
    try:
        for part in table:
            made = rows(part)
            writer = writer or parquet.ParquetWriter(out, made.schema)
            writer.write_table(made, row_group_size=max(1, len(part.ids)))
    finally:
        if writer is not None:
            writer.close()


def write_folder(table: Table, out: Path) -> None:
    """Write a folder with the parts, and `index.json` with the samples of each part and the names of the classes.

    A part has tensors ids, labels and each column, and its paths as JSON in the metadata under `texts`.
    """
    out.mkdir()
    files = {}
    for number, path in enumerate(table.parts):
        name = f"part-{number:05d}-of-{len(table.parts):05d}.safetensors"
        try:
            os.link(path, out / name)
        except OSError:  # The file system has no hard links.
            shutil.copyfile(path, out / name)
        files[name] = len(read_part(path).ids)
    index = {"samples": sum(files.values()), "parts": files, "classes": table.classes}
    (out / "index.json").write_text(json.dumps(index, indent=2) + "\n")


WRITERS: dict[str, Callable[[Table, Path], None]] = {".npz": write_npz, ".parquet": write_parquet, "": write_folder}
"""Writers by the ending of the file; no ending stands for a folder."""


def finish(table: Table, out: Path) -> None:
    """Write OUT from the parts, atomically."""
    with made_beside(out) as temporary:
        WRITERS[out.suffix](table, temporary)
