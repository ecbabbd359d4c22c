"""Fuzzing of Parquet files with changed footers, page headers and pages."""

from __future__ import annotations

import io
import json
import random
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from mimae.bench.harness.fuzz.case import Case
from mimae.bench.harness.fuzz.draws import damaged, integer
from mimae.bench.harness.fuzz.forked import Wrong
from mimae.bench.harness.fuzz.images import bases
from mimae.bench.harness.fuzz.kind import Kind
from mimae.bench.harness.fuzz.sources import read
from mimae.bench.harness.fuzz.thrift import damaged_struct, encode
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.data.sources.thrift import read_struct

_MAGIC = b"PAR1"


@lru_cache(1)
def files() -> list[tuple[bytes, list[int]]]:
    """Return valid files with the offsets of their pages.

    They are plain, compressed, or in Hugging Face's layout, with class names or numbers.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    images = [data for _, data, _ in bases()[:8]]
    structs = pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)])
    notes = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    tables = [
        pa.table({"image": structs, "label": [i % 2 for i in range(8)]}).replace_schema_metadata(
            {"huggingface": json.dumps(notes)}
        ),
        pa.table({"jpg": images, "cls": [f"class {i % 2}" for i in range(8)]}),
        pa.table({"image": structs, "label": pa.array([None, 1] * 4, pa.int8()), "other": [[1.5]] * 8}),
    ]
    options: list[dict[str, Any]] = [
        {"compression": "none"},
        {"compression": "snappy", "row_group_size": 3},
        {"compression": "zstd", "data_page_version": "2.0", "use_dictionary": False},
        {"compression": "gzip", "write_page_index": True, "use_byte_stream_split": False},
    ]
    made = []
    for i, option in enumerate(options * 2):
        sink = io.BytesIO()
        pq.write_table(tables[i % len(tables)], sink, **option)
        data = sink.getvalue()
        metadata = pq.read_metadata(io.BytesIO(data))
        chunks = [
            metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
        ]
        pages = {chunk.data_page_offset for chunk in chunks} | {
            chunk.dictionary_page_offset for chunk in chunks if chunk.has_dictionary_page
        }
        made.append((data, sorted(pages)))
    return made


def make(draw: random.Random) -> Case:
    every = files()
    data, pages = draw.choice(every)
    chance = draw.random()
    if chance < 0.45:
        data = _footer(draw, data)
    elif chance < 0.75:
        data = _page(draw, data, draw.choice(pages))
    if chance > 0.7 and chance < 0.97:
        data = damaged(draw, data, [other for other, _ in every])
    keys = [
        draw.choice(("null", "null", "image", "jpg", "other", "x")),
        draw.choice(("null", "null", "label", "cls", "other")),
    ]
    return Case({"set/1.parquet": data}, ["set", *keys])


def _footer(draw: random.Random, data: bytes) -> bytes:
    """Return a file with a changed footer. The length before the magic bytes is usually right."""
    length = int.from_bytes(data[-8:-4], "little")
    _, fields = read_struct(data[-8 - length : -8])
    footer = encode(damaged_struct(draw, fields))
    if draw.random() < 0.15:
        footer = damaged(draw, footer)
    told = struct.pack("<I", len(footer)) if draw.random() < 0.95 else integer(draw, 4, len(footer))
    return data[: -8 - length] + footer + told + _MAGIC


def _page(draw: random.Random, data: bytes, at: int) -> bytes:
    """Return a file with another page header of the same length, most often, or with another content of the page."""
    size, fields = read_struct(data[at : at + 65_536])
    if draw.random() < 0.3:
        return data[: at + size] + damaged(draw, data[at + size : at + size + 64]) + data[at + size + 64 :]
    header = encode(damaged_struct(draw, fields))
    # Offsets in the footer are valid only if the length does not change.
    kept = data[at + size :] if draw.random() < 0.3 else data[at + len(header) :]
    return data[:at] + header + kept


def use(folder: Path, case: Case) -> str:
    path, image_key, label_key = case.words
    keys = {"image_key": image_key, "label_key": label_key}
    given = {key: None if value == "null" else value for key, value in keys.items()}
    settings = DataSettings(image_size=16, max_pixels=1_000_000).model_copy(update=given)
    source = open_source(path, folder, settings)

    import pyarrow.parquet as pq

    rows = pq.read_metadata(folder / "set/1.parquet").num_rows
    if rows != len(source):
        raise Wrong(f"{len(source)} samples from {rows} rows")
    return read(source, settings)


PARQUET = Kind(make, use, files)
