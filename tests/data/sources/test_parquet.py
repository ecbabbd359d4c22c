"""Parquet files as Hugging Face and others write them: the rows' bytes, and errors for what cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimae.bench.harness.fuzz.case import from_json
from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources import pages, parquet
from mimae.data.sources.open import open_source
from tests.data.conftest import settle

BYTES = [b"row %d" % i * 30 for i in range(10)]


def images(rows: list[bytes | None], names: list[str | None] | None = None) -> pa.Array:
    """Return images in Hugging Face's form: structs of bytes and a path."""
    names = names or [f"é{i}.png" for i in range(len(rows))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data, "path": name} for data, name in zip(rows, names)], kind)


def noted(**features: Any) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, **options: Any) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **{"row_group_size": 4, **options})
    return path


CLASSES = noted(picture={"_type": "Image"}, kind={"_type": "ClassLabel", "names": ["cat", "dog"]})
"""Hugging Face's metadata names columns that no other rule would find."""


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"compression": "none"}, {"row_group_size": 100}])
def test_files_of_hugging_face(tmp_path: Path, options: dict[str, Any]) -> None:
    columns = {"id": range(10), "label": range(10), "kind": [0, 1] * 5, "picture": images([*BYTES])}
    for number, part in enumerate((slice(0, 7), slice(7, 10))):
        write(tmp_path / f"{number}.parquet", {k: v[part] for k, v in columns.items()}, CLASSES, **options)
    source = open_source(str(tmp_path))
    assert [source.read(i) for i in range(10)] == BYTES
    assert source.labels is not None and source.labels.tolist() == [0, 1] * 5
    assert source.classes == ["cat", "dog"]
    assert source.path(8) == f"{tmp_path}/1.parquet, row 1 (é8.png)"
    groups = [0, 7, 10] if "row_group_size" in options else [0, 4, 7, 10]
    assert source.shares[0].blocks.tolist() == groups


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"img": images([*BYTES])}, None),
        ({"text": ["x"] * 10, "jpg": BYTES, "cls": list(range(10))}, list(range(10))),
        ({"image": pa.array(BYTES, pa.large_binary()), "label": [0.5] * 10}, None),
        ({"image": images([*BYTES]), "label": [None] * 10}, None),
        ({"image": images([*BYTES]), "label": [-1] * 10}, None),  # Hugging Face's mark for an unknown class.
    ],
)
def test_columns_are_found_by_type_and_name(tmp_path: Path, columns: dict[str, Any], labels: list[int] | None) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", columns)))
    assert [source.read(i) for i in range(10)] == BYTES
    assert (None if source.labels is None else source.labels.tolist()) == labels


def test_rows_without_bytes(tmp_path: Path) -> None:
    rows: list[bytes | None] = [b"0", None, b"2", b""]
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(rows, [None, "web/1.png", None, None])})))
    assert [source.read(i) for i in (0, 2, 3)] == [b"0", b"2", b""]
    with pytest.raises(OSError, match="has no image bytes"):
        source.read(1)
    assert [source.path(i) for i in (0, 1)] == [
        f"{tmp_path}/a.parquet, row 0",
        f"{tmp_path}/a.parquet, row 1 (web/1.png)",
    ]
    for i in (-1, 4):
        with pytest.raises(IndexError):
            source.read(i)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images([b"x"])})
    write(tmp_path / "b.parquet", {"text": ["x"], "n": [1]})
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing more")
    (tmp_path / "d.parquet").touch()
    with pytest.raises(DataError) as refusal:
        open_source(str(tmp_path))
    lines = str(refusal.value).splitlines()
    assert lines[0] == "3 of 4 Parquet files cannot be used:"
    assert (
        lines[1] == f"  {tmp_path}/b.parquet: it has no column of image bytes; its columns are text (string), n (int64)"
    )
    assert lines[2].startswith(f"  {tmp_path}/c.parquet: ") and lines[3].startswith(f"  {tmp_path}/d.parquet: ")


def test_files_of_different_sets(tmp_path: Path) -> None:
    for name, classes in (("a", ["cat"]), ("b", ["dog"])):
        notes = noted(label={"_type": "ClassLabel", "names": classes})
        write(tmp_path / f"{name}.parquet", {"image": images([b"x"]), "label": [0]}, notes)
    with pytest.raises(DataError, match=r"class names .* differ"):
        open_source(str(tmp_path))


def test_files_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images([])})
    with pytest.raises(DataError, match="hold no rows"):
        open_source(str(tmp_path))


def test_file_that_changes_or_is_damaged_under_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_kept", parquet._Kept())
    path = write(tmp_path / "a.parquet", {"image": images([*BYTES])}, compression="snappy", use_dictionary=False)
    source = open_source(str(path))
    assert source.read(0) == BYTES[0]
    status, data = path.stat(), bytearray(path.read_bytes())
    data[path.stat().st_size // 3 : path.stat().st_size // 2] = b"\xff" * 100
    path.write_bytes(data[: status.st_size].ljust(status.st_size, b"\0"))
    with pytest.raises(OSError, match="changed since"):
        source.read(9)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OSError):
        [source.read(i) for i in range(10)]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(9)


def test_process_keeps_a_bounded_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two row groups of 4,000 bytes, the third one evicts the least recently used one."""
    monkeypatch.setattr(parquet, "KEPT_BYTES", 9000)
    monkeypatch.setattr(parquet, "_kept", parquet._Kept())
    reads: list[int] = []
    row_group = parquet._row_group

    def counted(path: Path, stamp: tuple[int, int], number: int, image_key: str | None) -> Any:
        reads.append(number)
        return row_group(path, stamp, number, image_key)

    monkeypatch.setattr(parquet, "_row_group", counted)
    rows: list[bytes | None] = [os.urandom(1000) for _ in range(16)]
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(rows)})))
    for i in (0, 1, 3, 4, 0, 8, 7, 2, 15, 9):
        assert source.read(i) == rows[i]
    assert reads == [0, 1, 2, 1, 0, 3, 2]


def test_index_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": images([*BYTES]), "label": [0, 1] * 5}, noted())
    settle(tmp_path)
    first = open_source(str(path))
    monkeypatch.setattr(parquet, "_read_footer", None)
    again = open_source(str(path))
    assert again.fingerprint == first.fingerprint and again.path(9) == first.path(9)
    assert again.labels is not None and np.array_equal(again.labels, [0, 1] * 5)
    assert again.read(9) == BYTES[9]


def test_notes_and_names_out_of_the_ordinary(tmp_path: Path) -> None:
    names: list[str | None] = [f"{i}.png" for i in range(10)]
    notes = [json.dumps(note) for note in (None, {"info": None}, {"info": {"features": {"my.label": "int64"}}})]
    for number, note in enumerate(notes):
        columns = {"my.image": images([*BYTES], names), "label": [0, 1] * 5}
        write(tmp_path / f"{number}.parquet", columns, {"huggingface": note})
    source = open_source(str(tmp_path))
    assert [source.read(i) for i in range(30)] == BYTES * 3
    assert source.path(3) == f"{tmp_path}/0.parquet, row 3 (3.png)" and source.labels is not None


def test_cached_index_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": images([*BYTES])})
    settle(tmp_path)
    open_source(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'mimae\[parquet\]'"):
        open_source(str(path))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"pip install 'mimae\[parquet\]'"):
        open_source(str(tmp_path))


# Keys, labels and claims


def test_keys_name_the_columns(tmp_path: Path) -> None:
    columns = {"thumb": images([b"t"] * 10), "image": images([*BYTES]), "raw": BYTES, "kind": ["b", "a"] * 5}
    path = str(write(tmp_path / "a.parquet", {**columns, "n": range(10)}))
    for key, first in ((None, b"t"), ("image", BYTES[0]), ("image.bytes", BYTES[0]), ("raw", BYTES[0])):
        assert open_source(path, settings=DataSettings(image_key=key)).read(0) == first
    for key, labels in (("kind", [1, 0]), ("n", [0, 1])):
        source = open_source(path, settings=DataSettings(label_key=key))
        assert source.labels is not None and source.labels.tolist()[:2] == labels
    assert open_source(path, settings=DataSettings(label_key="kind")).classes == ["a", "b"]
    with pytest.raises(
        DataError, match=r"data.image_key=kind is not a column of image bytes; legal: thumb, image, raw of"
    ):
        open_source(path, settings=DataSettings(image_key="kind"))
    with pytest.raises(
        DataError, match=r"data.label_key=thumb is not a column of numbers or names; its columns are thumb"
    ):
        open_source(path, settings=DataSettings(label_key="thumb"))


def test_the_one_column_of_bytes_is_taken(tmp_path: Path) -> None:
    assert open_source(str(write(tmp_path / "a.parquet", {"pixels": BYTES, "n": range(10)}))).read(3) == BYTES[3]
    two = write(tmp_path / "b.parquet", {"pixels": BYTES, "depth": BYTES})
    with pytest.raises(DataError, match=r"no column of image bytes; data\.image_key names one of pixels, depth; its"):
        open_source(str(two))


@pytest.mark.parametrize(
    ("label", "classes", "note"),
    [
        (["cat", "dog"] * 5, ["cat", "dog"], None),
        ([True, False] * 5, None, None),
        ([0.5] * 10, None, "column label is of type double"),
        ([-1, 3] * 5, None, "column label is -1 in 5 of 10 rows"),
        ([None, 3] * 5, None, "column label is null in 5 of 10 rows"),
        ([None, "cat"] * 5, None, "column label is null in 5 of 10 rows"),
    ],
)
def test_labels_that_are_text_and_labels_that_are_dropped(
    tmp_path: Path, label: list[Any], classes: list[str] | None, note: str | None
) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images([*BYTES]), "label": label})))
    assert (source.labels is None) == (note is not None) and source.classes == classes
    assert [note in text for text in source.notes] == [True] if note else source.notes == ()


def test_columns_with_one_name_are_refused(tmp_path: Path) -> None:
    columns = [images([b"x"]), images([b"y"]), pa.array([1]), pa.array([2])]
    for names, twice in ((["image", "image", "a", "b"], "image"), (["image", "picture", "label", "label"], "label")):
        pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=f"it has 2 columns called {twice}; rename or remove one of them"):
            open_source(str(tmp_path))
    pq.write_table(pa.Table.from_arrays(columns, ["image", "a", "b", "b"]), tmp_path / "a.parquet")
    assert len(open_source(str(tmp_path))) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"huggingface": "no JSON"},
        {"huggingface": "[" * 100_000},
        noted(label={"_type": "ClassLabel", "names": {"0": "cat", "1": "dog"}}),
        noted(label={"_type": "ClassLabel", "names": ["cat", 1]}),
        noted(label={"_type": "ClassLabel", "names": ["cat"]}),  # and the classes are 0 and 1
    ],
)
def test_class_names_that_are_none_leave_the_numbers(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = write(tmp_path / "a.parquet", {"image": images([b"x", b"y"]), "label": [0, 1]}, metadata)
    settle(tmp_path)
    for _ in range(2):  # The second index is from the cache.
        source = open_source(str(path))
        assert source.labels is not None and source.labels.tolist() == [0, 1] and source.classes is None


@pytest.mark.parametrize("files", [1, 2])
def test_class_names_that_a_class_lacks_are_not_used_and_that_is_told(tmp_path: Path, files: int) -> None:
    """With two files the first one alone would fit its names, which are the same in both."""
    for number, labels in enumerate([[0, 1], [1, 5]][-files:]):
        write(tmp_path / f"{number}.parquet", {"picture": images([b"x", b"y"]), "kind": labels}, CLASSES)
    source = open_source(str(tmp_path))
    assert source.labels is not None and source.labels.tolist() == [0, 1, 1, 5][-2 * files :]
    assert source.classes is None
    told = "the class names in the files are not used: there are 2, and the largest class number is 5"
    assert source.notes == (told,)
    assert open_source(str(tmp_path), settings=DataSettings(index_version=1)).notes == ()


def test_a_number_that_is_too_large_for_a_class_is_told(tmp_path: Path) -> None:
    label = pa.array([2**63 + 3, 5], pa.uint64())
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images([b"x", b"y"]), "label": label})))
    assert source.labels is None and "column label is 9223372036854775811 in 1 of 2 rows" in source.notes[0]


def test_a_file_without_classes_among_others_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images([b"x"]), "label": [1]})
    write(tmp_path / "b.parquet", {"image": images([b"x"])})
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert source.notes == (
        "no sample has a class, since 1 of 2 files have no column of classes, for example b.parquet",
    )


def test_class_names_of_several_files(tmp_path: Path) -> None:
    for name, label in (("a", ["dog", "cat"]), ("b", ["ape", "dog"])):
        write(tmp_path / f"{name}.parquet", {"image": images([b"x", b"y"]), "label": label})
    source = open_source(str(tmp_path))
    assert source.classes == ["ape", "cat", "dog"]
    assert source.labels is not None and source.labels.tolist() == [2, 1, 0, 2]
    assert open_source(str(tmp_path), settings=DataSettings(index_version=1)).labels is None
    write(tmp_path / "c.parquet", {"image": images([b"x"]), "label": [1]})
    with pytest.raises(DataError, match=r"class names .* differ"):
        open_source(str(tmp_path))


def test_large_row_groups_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1000)
    path = write(tmp_path / "a.parquet", {"image": images([os.urandom(900) for _ in range(8)])})
    (note,) = open_source(str(path)).notes
    assert "a.parquet" in note and "mimae data pack" in note and "data.workers" in note


def footer(path: Path, change: Any) -> None:
    """Change the footer's bytes; its length is stored after it."""
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    new = change(data[-8 - length : -8])
    path.write_bytes(data[: -8 - length] + new + len(new).to_bytes(4, "little") + b"PAR1")


def varint(value: int) -> bytes:
    """Encode a number as in thrift's compact protocol."""
    value, found = value * 2, bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def test_rows_that_a_footer_makes_up(tmp_path: Path) -> None:
    """A file of 700 bytes would take gigabytes for an index of half a billion rows."""
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 77}, row_group_size=100)
    assert len(open_source(str(path))) == 77
    footer(path, lambda data: data.replace(varint(77), varint(443_000_000)))
    with pytest.raises(DataError, match=r"claims 443,000,000 rows"):
        open_source(str(path))


def test_a_column_that_expands_without_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's dictionary has one image of 100 KB, to which 3,000 rows refer."""
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1 << 20)
    monkeypatch.setattr(parquet, "_kept", parquet._Kept())
    path = write(tmp_path / "a.parquet", {"image": [bytes(100_000)] * 3000}, row_group_size=3000)
    assert path.stat().st_size < 20_000
    with pytest.raises(OSError, match="column image expands to more than the"):
        open_source(str(path)).read(0)


def test_class_names_that_expand_without_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1 << 20)
    columns = {"image": [b"x"] * 300, "label": ["n" * 50_000] * 300}
    path = write(tmp_path / "a.parquet", columns, row_group_size=300)
    with pytest.raises(DataError, match="column label expands to more than the 1,048,576 bytes"):
        open_source(str(path))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_page_that_claims_more_than_its_footer(tmp_path: Path, compression: str) -> None:
    """Room for a page is made before it is unpacked."""
    path = write(tmp_path / "a.parquet", {"image": [b"abc"] * 10}, compression=compression, use_dictionary=False)
    data = path.read_bytes()
    assert data[4] == data[6] == 0x15, "a page's header begins with its type and its size, as integers"
    size = data[7:].index(next(byte for byte in data[7:] if byte < 128)) + 1
    path.write_bytes(data[:7] + varint(2_000_000_000) + data[7 + size :])
    with pytest.raises(OSError, match=r"pages of column image claim|the page at byte \d+ claims|no page at"):
        open_source(str(path)).read(0)


def test_footers_that_contradict_their_columns(tmp_path: Path) -> None:
    """pyarrow itself ends the process, asks for gigabytes, or returns too few rows."""
    for case in sorted((Path(__file__).parents[2] / "fixtures/fuzz").glob("parquet-*.json")):
        folder = tmp_path / case.stem
        folder.mkdir()
        from_json(case.read_text())[1].write(folder)
        with pytest.raises(DataError, match="1 of 1 Parquet files cannot be used"):
            open_source(str(folder / "set"))


@given(st.binary(max_size=200))
def test_no_bytes_of_pages_end_in_anything_but_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "pages"
    path.write_bytes(data)
    with path.open("rb") as file, contextlib.suppress(OSError):
        assert pages.unpacked_size(file.fileno(), 0, len(data)) >= 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ((1 << 31).to_bytes(4, "little") + b"PAR1", "its footer claims 2,147,483,648 bytes"),
        (b"\0\0\0\0PAR2", "is not a Parquet file"),
    ],
)
def test_footers_that_cannot_be(tmp_path: Path, end: bytes, said: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 3})
    path.write_bytes(path.read_bytes()[:-8] + end)
    with pytest.raises(DataError, match=said):
        open_source(str(path))


def test_a_row_larger_than_the_bound(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images([b"x" * 10, b"y" * 200])})
    source = open_source(str(path), settings=DataSettings(max_bytes=100))
    assert source.read(0) == b"x" * 10
    with pytest.raises(OSError, match=r"200 bytes, more than data.max_bytes = 100"):
        source.read(1)
