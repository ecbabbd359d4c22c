"""Tar shards: every sample of WebDataset's format is found, in every dialect of tar, and errors name what is wrong."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources import patterns, shards
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from tests.data.conftest import settle

Members = Iterable[tuple[str, bytes]]


def member(name: str, size: int, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            tar.addfile(member(name, len(data)), io.BytesIO(data))
    return path


def contents(source: Source) -> list[tuple[str, bytes]]:
    return [(source.path(i), source.read(i)) for i in range(len(source))]


def refusals(source: Source) -> dict[str, str]:
    """Return the reasons of the samples that cannot be read, by path."""
    found = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except OSError as error:
            found[source.path(i)] = str(error)
    return found


def test_samples_are_groups_of_members_with_one_key(tmp_path: Path) -> None:
    """The key ends at the first dot of the last part of the name; consecutive members with one key form a sample."""
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.cls", b"3"),
            ("x/1.jpg", b"first"),
            ("x/1.seg.png", b"a mask"),
            ("x/1.png", b"another image of the same sample"),
            ("y/1.JPEG", b"second"),  # The folder is part of the key.
            ("y/1.json", b'{"label": 5, "caption": "a dog"}'),
            ("v1.0/2.txt", b"a caption"),  # A dot in the folder does not end the key.
            ("v1.0/2.webp", b"third"),
            ("v1.0/2.json", b'{"label": 9}'),
            ("v1.0/2.cls", b"4\n"),  # .cls has priority over .json.
            ("stats.json", b'{"label": 1}'),  # No sample without an image.
            ("README", b""),
            ("._hidden.png", b"x"),
        ],
    )
    source = open_source(str(path))
    assert contents(source) == [
        (f"{path}/x/1.jpg", b"first"),
        (f"{path}/y/1.JPEG", b"second"),
        (f"{path}/v1.0/2.webp", b"third"),
    ]
    assert source.labels is not None and source.labels.dtype == np.int64
    assert source.labels.tolist() == [3, 5, 4] and source.classes is None


@pytest.mark.parametrize(
    "label",
    [("b.txt", b"no class"), ("b.cls", b"cat"), ("b.cls", b"-1"), ("b.json", b'{"label": 1.5}'), ("b.json", b"[")],
)
def test_half_a_labelling_is_none(tmp_path: Path, label: tuple[str, bytes]) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("a.cls", b"0"), ("b.png", b"2"), label])
    source = open_source(str(path))
    assert len(source) == 2 and source.labels is None


KEYS = st.text(st.sampled_from("aB0-_é写 "), min_size=1, max_size=4)
NAMES = st.lists(st.one_of(KEYS, st.just("d" * 90)), min_size=1, max_size=4).map("/".join)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1100)), min_size=1, max_size=6, unique_by=lambda pair: pair[0]),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_reads(tmp_path: Path, written: list[tuple[str, bytes]], format: int) -> None:
    """Names of more than 100 bytes need L or x headers. Sizes are below, equal to and above a block of 512 bytes."""
    path = write_tar(tmp_path / "a.tar", [(f"{name}.png", data) for name, data in written], format)
    assert contents(open_source(str(path))) == [(f"{path}/{name}.png", data) for name, data in written]


def test_ustar_prefix_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    long = "folder" * 20 + "/" + "n" * 60 + ".png"  # 125 bytes before the slash: ustar splits it.
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, errors="surrogateescape") as tar:
        for name, data in ((long, b"one"), (os.fsdecode(b"caf\xe9.png"), b"two")):
            tar.addfile(member(name, len(data)), io.BytesIO(data))
    assert contents(open_source(str(path))) == [
        (f"{path}/{long}", b"one"),
        (os.path.join(path, os.fsdecode(b"caf\xe9.png")), b"two"),
    ]


def with_sum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("magic", "size"),
    [
        (b"\0" * 8, b"00000000005\0"),  # The format of Unix's seventh edition, without a magic word.
        (b"ustar  \0", b"\x80" + b"\0" * 10 + b"\5"),  # Base 256, as GNU writes sizes from 8 GiB on.
        (b"ustar\00000", b"         5 \0"),  # Spaces instead of zeros.
    ],
)
def test_dialects_of_headers(tmp_path: Path, magic: bytes, size: bytes) -> None:
    header = bytearray(member("a.png", 5).tobuf(tarfile.USTAR_FORMAT))
    header[257:265], header[124:136] = magic, size
    path = tmp_path / "a.tar"
    path.write_bytes(with_sum(header) + b"pixel".ljust(512, b"\0") + bytes(1024))
    assert contents(open_source(str(path))) == [(f"{path}/a.png", b"pixel")]


def test_pax_size_wins(tmp_path: Path) -> None:
    """A size that the ustar field cannot represent is in the pax header, and the field is ignored."""
    info = member("a.png", 5, pax_headers={"size": "5", "path": "b.png"})
    plain = info.create_pax_header(info.get_info(), "utf-8")
    header = bytearray(plain[-512:])
    header[124:136] = b"00000000000\0"
    path = tmp_path / "a.tar"
    path.write_bytes(plain[:-512] + with_sum(header) + b"pixel".ljust(512, b"\0") + bytes(1024))
    assert contents(open_source(str(path))) == [(f"{path}/b.png", b"pixel")]


# A bad sample affects no other sample


def test_samples_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    links = {"hard.png": tarfile.LNKTYPE, "soft.png": tarfile.SYMTYPE, "null.png": tarfile.CHRTYPE}
    names = [
        *("good.png", "good.seg.png", "../out.png", "/etc/x.png", "a/../../y.png", "p.q.png", "p.r.png", *links),
        *("good.png", "twin.png", "twin.png", "..fine/..z/last.png"),
    ]
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = member(name, 0 if name in links else 3, type=links.get(name, tarfile.REGTYPE), linkname="good.png")
            tar.addfile(info, io.BytesIO(b"abc"))
        tar.addfile(member("folder.png", 0, type=tarfile.DIRTYPE))
    source = open_source(str(path))
    # By sample number: good.png and twin.png are good the first time and bad the second time.
    expected = {
        **dict.fromkeys((1, 2, 3), "its name points outside of the shard"),
        **dict.fromkeys((4, 5), "two dots"),
        **dict.fromkeys((6, 7, 8), "it is a link or a device"),
        **dict.fromkeys((9, 11), "an earlier sample of the shard has the same key"),
    }
    names.remove("good.seg.png")  # A mask in the sample of an image.
    assert [source.path(i) for i in range(len(source))] == [f"{path}/{name}" for name in names]
    for i in range(len(source)):
        if i in expected:
            with pytest.raises(OSError, match=expected[i]):
                source.read(i)
        else:
            assert source.read(i) == b"abc"


def pair(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """A complete shard, and one to be damaged with its bytes: two samples of 700 bytes and their classes."""
    members = [(f"{i}.{ending}", data) for i in range(2) for ending, data in (("png", bytes(700)), ("cls", b"1"))]
    whole = write_tar(tmp_path / "whole.tar", members)
    return whole, tmp_path / "x.tar", whole.read_bytes()


@pytest.mark.parametrize(
    ("cut", "samples", "reasons"),
    [
        # Headers at 0, 1536, 2560, 4096; data of the second image from 3072 to 3772; end mark at 5120.
        (5120, 2, ["the shard is cut off at byte 5120"]),
        (4700, 2, ["the shard is cut off at byte 4700"]),
        (4200, 2, ["the shard is cut off at byte 4096"]),
        (3780, 2, ["the shard is cut off at byte 3780"]),
        (3500, 2, ["the shard ends in the middle of it", "the shard is cut off at byte 3500"]),
        (2600, 1, ["the shard is cut off at byte 2560"]),
    ],
)
def test_shard_that_is_cut_off(tmp_path: Path, cut: int, samples: int, reasons: list[str]) -> None:
    """The remaining samples are used, and the loss has a separate entry under the shard's name."""
    whole, path, data = pair(tmp_path)
    path.write_bytes(data[:cut])
    source = open_source(str(tmp_path / "{whole,x}.tar"))
    found = refusals(source)
    assert len(source) == 2 + samples + 1
    assert [text.partition(";")[0] for text in found.values()] == reasons
    assert list(found)[-1] == str(path) and str(whole) not in " ".join(found)
    # Classes are kept if all readable samples have one.
    assert (source.labels is not None) == (cut not in (4200, 3780))


def test_shard_that_is_damaged_inside(tmp_path: Path) -> None:
    _, path, data = pair(tmp_path)
    path.write_bytes(data[:2560] + b"x" + data[2561:])
    found = refusals(open_source(str(path)))
    assert found == {str(path): "the shard is damaged at byte 2560, where a header should be; the rest is lost"}


def damaged_pair(tmp_path: Path, first: bytes) -> dict[str, str]:
    """Return what cannot be read of a shard of two samples, with `first` before its second image's header at 2560."""
    _, path, data = pair(tmp_path)
    path.write_bytes(data[:2560] + first + data[2560:])
    source = open_source(str(path))
    assert source.read(0) == bytes(700)
    return refusals(source)


@pytest.mark.parametrize("size", [b"\x80\0\0\0\x80" + bytes(7), b"\xff" * 12])  # 2^63, and GNU's -1.
def test_size_that_no_file_has(tmp_path: Path, size: bytes) -> None:
    header = bytearray(member("a.png", 5).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    (reason,) = damaged_pair(tmp_path, with_sum(header)).values()
    assert reason.startswith("the shard is damaged at byte 2560")


@pytest.mark.parametrize("digits", [20, 5000])  # More than int64; more than int() accepts.
def test_pax_size_that_no_file_has(tmp_path: Path, digits: int) -> None:
    info = member("a.png", 5, pax_headers={"size": "9" * digits})
    (reason,) = damaged_pair(tmp_path, info.create_pax_header(info.get_info(), "utf-8")).values()
    assert reason.startswith("the shard is damaged at byte 2560")


def test_pax_record_of_a_length_that_no_number_has(tmp_path: Path) -> None:
    """A damaged record is ignored."""
    header = bytearray(member("x", 5000, type=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT))
    assert damaged_pair(tmp_path, with_sum(header) + (b"9" * 4990 + b" path=b.p").ljust(5120, b"\0")) == {}


def test_folder_with_a_size_ends_no_shard(tmp_path: Path) -> None:
    """Some archivers write the size on disk of folders and links; no data follow."""
    header = bytearray(member("folder", 0, type=tarfile.DIRTYPE).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"%011o\0" % (1 << 20)
    assert damaged_pair(tmp_path, with_sum(header)) == {}


def test_zeros_that_no_archiver_writes(tmp_path: Path) -> None:
    """A file system returns zeros for the end of a shard that was never written, or for all of it."""
    _, path, data = pair(tmp_path)
    path.write_bytes(data[:5120] + bytes(1 << 20))
    assert refusals(open_source(str(path))) == {}
    path.write_bytes(data[:5120] + bytes((1 << 20) + 512))
    assert list(refusals(open_source(str(path)))) == [str(path)]
    path.write_bytes(bytes(20480))
    assert list(refusals(open_source(f"{tmp_path}/{{whole,x}}.tar"))) == [str(path)]


def test_joined_archives(tmp_path: Path) -> None:
    """After `cat a.tar b.tar` every reader of tar stops at the first end mark, so half of the data would be missing."""
    _, path, data = pair(tmp_path)
    path.write_bytes(data + data)
    assert "continues after its end mark at byte 5120" in refusals(open_source(str(path)))[str(path)]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_entry_or_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    """Damage never makes the scan hang, crash, or point outside of the file."""
    _, path, whole = pair(tmp_path)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, 5200), max_size=6)):
        if place < len(damaged):
            damaged[place] = data.draw(st.sampled_from([0, 1, 48, 49, 55, 76, 120, 128, 255]))
    path.write_bytes(damaged)
    try:
        source = open_source(str(path))
    except DataError:
        return
    for i in range(len(source)):
        if source.path(i) not in refusals(source):
            assert len(source.read(i)) <= len(damaged)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty, 0 bytes"),
        (b"\x1f\x8b" + bytes(600), r"is compressed \(gzip\).*unpack it"),
        (b"not a tar at all", "is not a tar file"),
        (b"A" * 1024, "is not a tar file"),
        (None, "contains no image; its first members are a.npy, b.tar\n"),
    ],
)
def test_shard_that_gives_nothing_is_refused_by_name(tmp_path: Path, data: bytes | None, reason: str) -> None:
    pair(tmp_path)
    path = tmp_path / "x.tar"
    if data is None:
        write_tar(path, [("a.npy", b"1"), ("b.tar", b"2")])
    else:
        path.write_bytes(data)
    with pytest.raises(DataError, match=f"1 of 2 shards cannot be used:\n  {path}: it {reason}"):
        open_source(str(tmp_path / "*.tar"))


def test_shards_without_members(tmp_path: Path) -> None:
    """An archiver that finds no files writes such shards. They are valid, unless all shards are empty."""
    whole, path, _ = pair(tmp_path)
    write_tar(path, [])
    assert open_source(str(tmp_path)).shares[0].blocks.tolist() == [0, 2, 2]
    whole.unlink()
    with pytest.raises(DataError, match=f"{tmp_path}: the shards contain no images"):
        open_source(str(path))


def test_shard_that_cannot_be_opened_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be opened is refused. Root may open any file, so the test raises the error itself."""
    _, path, data = pair(tmp_path)
    path.write_bytes(data)
    open_file = os.open

    def refusing(name: bytes, flags: int) -> int:
        if name == os.fsencode(path):
            raise PermissionError(13, "Permission denied")
        return open_file(name, flags)

    monkeypatch.setattr(shards.os, "open", refusing)
    with pytest.raises(DataError, match=f"{path}: Permission denied"):
        open_source(str(tmp_path / "*.tar"))


def test_shard_that_goes_or_changes_while_it_is_read(tmp_path: Path) -> None:
    """The index no longer fits, so the bytes of another file under the same name must not be returned."""
    _, path, data = pair(tmp_path)
    path.write_bytes(data)
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(0)
    write_tar(path, [("other.png", b"x" * 700), ("more.png", b"y" * 2000)])
    assert path.stat().st_size == len(data)  # Archives are padded to 10 KiB, so sizes may be equal.
    with pytest.raises(OSError, match="has changed since"):
        source.read(0)
    fresh = open_source(str(path))
    assert fresh.read(0) == b"x" * 700
    os.truncate(path, 600)
    with pytest.raises(OSError, match="shorter"):
        fresh.read(1)


# Which shards


def four(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("t-08", "t-09", "t-10", "v-0"):
        write_tar(folder / f"{name}.tar", [(f"{name}.png", name.encode())])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("t-{08..10}.tar", ["t-08", "t-09", "t-10"]),
        ("t-{10,08}.tar", ["t-10", "t-08"]),  # In the requested order.
        ("{t-*,v-[0-9]}.tar", ["t-08", "t-09", "t-10", "v-0"]),
        ("t-?{8..9}.tar", ["t-08", "t-09"]),
        ("", ["t-08", "t-09", "t-10", "v-0"]),
        ("t-09.tar", ["t-09"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    four(tmp_path)
    (tmp_path / "README.md").touch()
    source = open_source(str(tmp_path / pattern))
    assert [source.read(i).decode() for i in range(len(source))] == expected
    assert source.shares[0].blocks.tolist() == list(range(len(expected) + 1))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("t-{08..11}.tar", "t-11.tar does not exist"),
        ("x-*.tar", "nothing matches .*x-"),
        ("t-{10..08}.tar", "counts backwards"),
        ("t-{08,*}.tar", "names .*t-08.tar twice"),
        ("{t-08.tar,a.parquet}", r"several kinds, 1 .tar \(t-08.tar\) and 1 .parquet \(a.parquet\); open one kind"),
        ("*.md", "matches .*README.md, which is not a shard"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, pattern: str, message: str) -> None:
    four(tmp_path)
    for name in ("README.md", "a.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / pattern))


def test_names_with_the_signs_of_patterns(tmp_path: Path) -> None:
    four(tmp_path / "data[1] {a,b}")
    assert len(open_source(str(tmp_path / "data[1] {a,b}"))) == 4
    assert len(open_source(str(tmp_path / "data[1] {a,b}" / "t-08.tar"))) == 1
    assert len(open_source("t-{08..09}.tar", tmp_path / "data[1] {a,b}")) == 2
    assert len(open_source("t-*.tar", tmp_path / "data[1] {a,b}")) == 3


def test_entries_beside_shards_that_are_none(tmp_path: Path) -> None:
    """A link to itself has no type that could be queried, and opening a pipe would wait for a writer."""
    four(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "x.tar")
    assert len(open_source(str(tmp_path))) == 4


def test_folder_whose_listing_fails_midway_holds_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the shards would be a different data set."""
    four(tmp_path)
    scan = os.scandir

    @contextmanager
    def failing(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        def entries() -> Iterator[os.DirEntry[str]]:
            with scan(folder) as found:
                yield next(found)
            raise PermissionError(13, "Permission denied")

        yield entries()

    monkeypatch.setattr(patterns.os, "scandir", failing)
    assert patterns.shards_in(tmp_path, 2) == []


@pytest.mark.parametrize("beside", ["1.png", "folder/1.png"])
def test_images_win_over_shards_beside_them(tmp_path: Path, beside: str) -> None:
    """ImageNet may be unpacked next to its archives. Runs that were started with version 1 use the images."""
    four(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / beside).write_bytes(b"image")
    old = open_source(str(tmp_path), settings=DataSettings(index_version=1))
    assert contents(old) == [(str(tmp_path / beside), b"image")] and old.notes == ()


@pytest.mark.parametrize("beside", ["preview.jpg", "folder/1.AVIF", "folder/deeper/1.png"])
def test_shards_and_images_together_are_refused(tmp_path: Path, beside: str) -> None:
    four(tmp_path)
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).touch()
    with pytest.raises(DataError) as refusal:
        open_source(str(tmp_path))
    text = str(refusal.value)
    assert "4 shards (t-08.tar, t-09.tar, t-10.tar and 1 more) and 1 image" in text and beside in text
    assert f"write {tmp_path}/*.tar for the shards" in text
    assert len(open_source(f"{tmp_path}/*.tar")) == 4


@pytest.mark.parametrize("shard", ["a/x.tar", "x.parquet"])
def test_a_shard_below_a_folder_of_images_is_refused_too(tmp_path: Path, shard: str) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.png", shard):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"1 shard \({shard}\) and 1 image \(b.png\)"):
        open_source(str(tmp_path))


# The index


def test_index_is_found_again_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four(tmp_path)
    settle(tmp_path)
    scans: list[Path] = []
    scan = shards._scan

    def counted(rules: shards._Rules, path: Path) -> shards._Samples | str:
        scans.append(path)
        return scan(rules, path)

    monkeypatch.setattr(shards, "_scan", counted)
    pattern = str(tmp_path / "t-*.tar")
    first, again = open_source(pattern), open_source(pattern)
    assert len(scans) == 3
    assert contents(first) == contents(again) and first.fingerprint == again.fingerprint
    write_tar(tmp_path / "t-09.tar", [("t-09.png", b"changed")])
    assert open_source(pattern).read(1) == b"changed"
    settle(tmp_path)
    (tmp_path / "t-10.tar").unlink()
    assert len(open_source(pattern)) == 2
    assert len(scans) == 8


def test_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    prints = []
    for folder, members in (("a", [("1.png", b"x")]), ("b", [("1.png", b"x")]), ("c", [("1.png", b"xy")])):
        (tmp_path / folder).mkdir()
        prints.append(open_source(str(write_tar(tmp_path / folder / "s.tar", members))).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def entries(path: Path, count: int) -> None:
    """Return a shard of `count` images of 3 bytes, with classes, without tarfile, which takes minutes for a million."""
    header = bytearray(member("0000000.jpg", 3).tobuf(tarfile.USTAR_FORMAT))
    label = bytearray(member("0000000.cls", 1).tobuf(tarfile.USTAR_FORMAT))
    with path.open("wb") as file:
        for i in range(count):
            for block, data in ((header, b"\xff\xd8\xff"), (label, b"%d" % (i % 10))):
                block[:7] = b"%07d" % i
                file.write(with_sum(block) + data.ljust(512, b"\0"))
        file.write(bytes(1024))


@pytest.mark.slow
def test_index_of_many_samples(tmp_path: Path) -> None:
    """100,000 samples in four shards are stored in columns and not as objects."""
    for number in range(4):
        entries(tmp_path / f"{number}.tar", 25_000)
    settle(tmp_path)
    first, again = open_source(str(tmp_path)), open_source(str(tmp_path))
    assert len(first) == 100_000 and first.fingerprint == again.fingerprint
    assert again.labels is not None and np.bincount(again.labels).tolist() == [10_000] * 10
    assert again.path(99_999) == str(tmp_path / "3.tar" / "0024999.jpg")
    assert again.read(77_777) == b"\xff\xd8\xff"


# Reading


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_reads_hold_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads read more shards than may be open at random: the bytes are right, and no file stays open."""
    count = shards.OPEN_SHARDS + 20
    for number in range(count):
        write_tar(tmp_path / f"{number:03}.tar", [(f"{i}.png", b"%d %d" % (number, i)) for i in range(3)])
    source = open_source(str(tmp_path))
    before = open_files()
    ids = np.random.default_rng(0).integers(0, len(source), 3000).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(source.read, ids))
    assert found == [b"%d %d" % divmod(i, 3) for i in ids]
    assert open_files() - before <= shards.OPEN_SHARDS
    shards._opened.cache_clear()
    assert open_files() <= before


def test_source_travels_to_another_process(tmp_path: Path) -> None:
    """Processes that are not forked get the source by pickle."""
    four(tmp_path)
    source = open_source(str(tmp_path))
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_ids_past_the_ends(tmp_path: Path) -> None:
    four(tmp_path)
    source = open_source(str(tmp_path))
    for i in (-1, 4):
        with pytest.raises(IndexError):
            source.read(i)
        with pytest.raises(IndexError):
            source.path(i)


# Which members


def test_a_key_names_the_member_that_is_the_image(tmp_path: Path) -> None:
    members = [(f"{i}.{end}", data) for i in range(2) for end, data in (("input.jpg", b"in"), ("mask.png", b"mask"))]
    path = write_tar(tmp_path / "a.tar", members)
    source = open_source(str(path))
    assert len(source) == 4 and "data.image_key=input.jpg selects 2 of them" in source.notes[0]
    assert "set data.image_key to the part after the first dot" in next(iter(refusals(source).values()))
    keyed = open_source(str(path), settings=DataSettings(image_key="Input.jpg"))
    assert [keyed.read(i) for i in range(len(keyed))] == [b"in"] * 2
    assert keyed.notes == ("left out of the shards, since they are neither images nor classes: 2 .mask.png",)
    with pytest.raises(DataError, match=r"no image whose name ends in .x.jpg, as data.image_key says"):
        open_source(str(path), settings=DataSettings(image_key="x.jpg"))


@pytest.mark.parametrize(
    ("key", "labels"),
    [
        ("kind.txt", [1, 0]),
        ("species", [1, 0]),  # A field of the .json.
        ("number", [7, 3]),
    ],
)
def test_a_key_names_what_holds_the_class(tmp_path: Path, key: str, labels: list[int]) -> None:
    members = []
    for i, (name, number) in enumerate((("dog", 7), ("cat", 3))):
        fields = b'{"species": "%b", "number": %d}' % (name.encode(), number)
        members += [(f"{i}.png", b"x"), (f"{i}.kind.txt", name.encode()), (f"{i}.json", fields)]
    path = write_tar(tmp_path / "a.tar", members)
    assert open_source(str(path)).labels is None
    source = open_source(str(path), settings=DataSettings(label_key=key))
    assert source.labels is not None and source.labels.tolist() == labels
    assert source.classes == (None if key == "number" else ["cat", "dog"])


def test_class_names_of_several_shards(tmp_path: Path) -> None:
    for shard, names in enumerate((["dog", "cat"], ["ape", "dog"])):
        members = [
            (f"{i}.{end}", data) for i, n in enumerate(names) for end, data in (("png", b"x"), ("cls", n.encode()))
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    source = open_source(str(tmp_path))
    assert source.classes == ["ape", "cat", "dog"]
    assert source.labels is not None and source.labels.tolist() == [2, 1, 0, 2]
    assert open_source(str(tmp_path), settings=DataSettings(index_version=1)).labels is None


@pytest.mark.parametrize(
    ("members", "notes"),
    [
        (["a.png", "b.png", "a.cls", "b.cls"], ["2 members with a class do not follow their image"]),
        (["a.png", "a.cls", "b.png"], ["no sample has a class, since 1 of 2 samples have none"]),
        (["a.png", "a.cls", "b.png", "b.name"], ["no sample has a class", "neither images nor classes: 1 .name"]),
        (["a.png", "a.cls", "a.txt", "a.npy", "readme"], ["1 without an extension, 1 .npy, 1 .txt"]),
        (["a.png"], []),
        (["a.png", "a.jpg", "a.seg.png", "a.txt"], ["is its image: 1 .jpg, 1 .seg.png; data", "nor classes: 1 .txt"]),
    ],
)
def test_what_is_not_used_is_told(tmp_path: Path, members: list[str], notes: list[str]) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"1") for name in members])
    found = open_source(str(path)).notes
    assert len(found) == len(notes) and all(text in note for text, note in zip(notes, found))


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("cls", b"1.0"),
        ("cls", b"-1"),
        ("cls", b""),
        ("cls", b"\xff"),
        ("json", b'{"text": "cat"}'),
        ("json", b"{"),
    ],
)
def test_classes_that_are_none_are_told(tmp_path: Path, ending: str, content: bytes) -> None:
    members = [(f"{i}.{end}", data) for i in range(2) for end, data in (("png", b"x"), (ending, content))]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert source.labels is None and len(source.notes) == 1
    assert "since none of 2 members that may have one has a number" in source.notes[0]
    assert source.notes[0].endswith(f"for example 0.{ending}")


def test_endings_of_members_follow_what_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.avif", b"a"), ("2.jpg?w=6", b"b"), ("3.heic", b"c")])
    source = open_source(str(path))
    assert len(source) == 2 and "1 .heic" in source.notes[0]
    write_tar(path, [("1.avif", b"a"), ("2.jpg", b"b")])
    assert len(open_source(str(path), settings=DataSettings(index_version=1))) == 1
