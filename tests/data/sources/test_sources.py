"""Folders and lists: a fixed order of samples, which is read from the cache until something changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources import files, index, lists, open
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from tests.data.conftest import settle, write_images


def touch(folder: Path, names: list[str]) -> None:
    """Make empty files: an index never opens them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(source: Source, folder: Path) -> list[str]:
    return [os.path.relpath(source.path(i), folder) for i in range(len(source))]


def test_folder_of_class_folders(tmp_path: Path) -> None:
    """Images have one of the known extensions in any case. The class of an image is its first folder, at any depth."""
    touch(tmp_path, ["b/2.jpg", "b/10.JPEG", "a/x/y/1.png", "a/3.webp", "a.b/4.TIF", "a.b/5.gif", "a.b/6.bmp"])
    touch(tmp_path, ["a/notes.txt", "a/jpg", ".git/7.png", "a/._8.png", "empty/readme.md"])
    source = open_source(str(tmp_path))
    # Byte order of the whole path: "." is before "/", "1" before "2".
    assert names_of(source, tmp_path) == [
        "a.b/4.TIF",
        "a.b/5.gif",
        "a.b/6.bmp",
        "a/3.webp",
        "a/x/y/1.png",
        "b/10.JPEG",
        "b/2.jpg",
    ]
    assert source.classes == ["a", "a.b", "b"]
    assert source.labels is not None and source.labels.dtype == np.int64
    assert source.labels.tolist() == [1, 1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize("names", [["2.png", "1.png"], ["1.png", "cat/2.png"]], ids=["flat", "mixed"])
def test_images_outside_class_folders_have_no_labels(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, names)
    source = open_source(str(tmp_path))
    assert names_of(source, tmp_path) == sorted(names)
    assert source.labels is None and source.classes is None


PARTS = st.text(st.sampled_from("aB.-0é写~"), min_size=1, max_size=3).filter(lambda s: not s.startswith("."))
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: "/".join(parts) + ".png")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(PATHS, min_size=1, max_size=25))
def test_order_is_that_of_the_paths_bytes(tmp_path: Path, paths: set[str]) -> None:
    root = tmp_path / "tree"
    shutil.rmtree(root, ignore_errors=True)
    touch(root, list(paths))
    expected = sorted(path.encode() for path in paths)
    assert [os.fsencode(name) for name in names_of(open_source(str(root)), root)] == expected


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write_images(tmp_path, [name])
    source = open_source(str(tmp_path))
    assert source.path(0) == str(tmp_path / name)
    assert source.read(0) == (tmp_path / name).read_bytes()


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, ["a/1.png", "b/2.png"])
    touch(tmp_path, ["elsewhere/3.png"])
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)  # A loop: root is a parent.
    (root / "b" / "self").symlink_to(root / "b")  # A loop too.
    (root / "d").symlink_to(root / "a")  # No loop: `a` again, under another name.
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere")  # This sample will be reported as bad.
    (root / "b" / "ring.png").symlink_to("ring.png")
    assert names_of(open_source(str(root)), root) == [
        "a/1.png",
        "b/2.png",
        "b/gone.png",
        "b/ring.png",
        "c/3.png",
        "d/1.png",
    ]


def test_reading_gives_the_bytes(tmp_path: Path) -> None:
    write_images(tmp_path, ["x/1.png", "y/2.png"])
    source = open_source(str(tmp_path))
    assert [source.read(i) for i in range(2)] == [(tmp_path / name).read_bytes() for name in ("x/1.png", "y/2.png")]
    for beyond in (2, -1):
        with pytest.raises(IndexError):
            source.read(beyond)


def test_fingerprint_is_of_names_and_labels(tmp_path: Path) -> None:
    touch(tmp_path, ["one/ab.png", "one/c.png", "two/a.png"])
    (tmp_path / "plain.txt").write_text("one/ab.png\none/c.png\n")
    (tmp_path / "labels.txt").write_text("one/ab.png\t0\none/c.png\t1\n")
    (tmp_path / "other.txt").write_text("one/ab.png\t1\none/c.png\t0\n")
    found = [open_source(str(tmp_path / name)).fingerprint for name in ("plain.txt", "labels.txt", "other.txt", "one")]
    assert len(set(found)) == 4
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert open_source(str(tmp_path / "copy")).fingerprint == found[3]


# Lists


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".txt", "b.png\t1\na.png\t0\nsub/c, d.png\t5\n"),
        (".tsv", "\ufeffb.png\t1\r\n\r\na.png\t0\r\nsub/c, d.png\t5"),  # Windows: a BOM, CR LF, a blank line.
        (".csv", 'b.png,1\na.png,0\n"sub/c, d.png",5\n'),
    ],
)
def test_list_keeps_its_order_and_labels(tmp_path: Path, suffix: str, text: str) -> None:
    write_images(tmp_path, ["a.png", "b.png", "sub/c, d.png"])
    path = tmp_path / f"list{suffix}"
    path.write_bytes(text.encode())
    source = open_source(str(path))
    assert names_of(source, tmp_path) == ["b.png", "a.png", "sub/c, d.png"]
    assert source.labels is not None and source.labels.tolist() == [1, 0, 5]
    assert source.read(2) == (tmp_path / "sub/c, d.png").read_bytes()


def test_list_of_paths_alone_may_name_any_place(tmp_path: Path) -> None:
    touch(tmp_path, ["here.png", "far/away.png"])
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "l.txt"
    path.write_text(f"../here.png\n{tmp_path}/far/away.png\nmissing.png\n")
    source = open_source(str(path))
    assert source.labels is None and len(source) == 3
    assert [os.path.exists(source.path(i)) for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image"),
        ("\n\n", "names no image"),
        ("a.png\t-1\n", r"line 1: '-1' is not a class number"),
        ("a.png\t1\nb.png\n", "line 2: some lines have a class and others do not"),
        ("a.png\t1\t2\n", "line 1: .* is not a path"),
        ("\t1\n", "line 1: .* is not a path"),
        ("x.png\ny.png\n", "none of its first 2 paths exists, the first being .*x.png.* relative to"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, ["a.png", "b.png"])
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as refusal:
        open_source(str(path))
    assert str(path) in str(refusal.value)


# Paths without images


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    missing = tmp_path / "imagenet" / "train"
    with pytest.raises(DataError) as refusal:
        open_source(str(missing))
    text = str(refusal.value)
    assert f"{missing} does not exist ({tmp_path} is the part of it that exists)" in text
    assert "a folder of images, a list file (.txt, .tsv, .csv), tar shards or Parquet files" in text
    assert "a mixture (.yaml), torchvision:NAME:ROOT, or one of the embedded sets photos, photos-test" in text


def test_file_that_is_no_list(tmp_path: Path) -> None:
    touch(tmp_path, ["train.bin"])
    with pytest.raises(DataError, match=r"train.bin is none of the supported kinds. A data path is"):
        open_source(str(tmp_path / "train.bin"))


@pytest.mark.parametrize("names", [[], ["a/readme.md", "a/b/x.mp4", ".hidden/1.png"]])
def test_folder_without_images(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, names)
    with pytest.raises(DataError, match=r"contains no images: \d folders? searched.*jpg, jpeg, png") as refusal:
        open_source(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


def test_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its images would be missing silently. Root may list any folder, so the test raises the error itself."""
    touch(tmp_path, ["a/1.png", "b/2.png"])
    scandir = os.scandir

    def refusing(folder: bytes | Path) -> object:
        if os.fsencode(folder).rstrip(b"/").endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(files.os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot list the folder .*/b/: Permission denied"):
        open_source(str(tmp_path))


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    """Reading a pipe would wait forever, and /dev/zero never ends. A list or a link can name both."""
    write_images(tmp_path, ["1.png"])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "2.png").symlink_to("pipe")
    (tmp_path / "3.png").symlink_to("/dev/zero")
    (tmp_path / "4.png").symlink_to(tmp_path)
    source = open_source(str(tmp_path))
    assert names_of(source, tmp_path) == ["1.png", "2.png", "3.png"]  # A link to a folder above is a loop.
    for i in (1, 2):
        with pytest.raises(OSError, match="not a regular file"):
            source.read(i)


# The cache


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The places that were indexed again, in order."""
    done: list[Path] = []
    for module, name in ((open, "scan_folder"), (lists, "read_list")):
        build = getattr(module, name)

        def counted(place: Path, *rules: int, build=build) -> index.Index:  # type: ignore[no-untyped-def]
            done.append(place)
            return build(place, *rules)

        monkeypatch.setattr(module, name, counted)
    return done


def described(source: Source) -> tuple[object, ...]:
    labels = None if source.labels is None else source.labels.tolist()
    return [source.path(i) for i in range(len(source))], labels, source.classes, source.fingerprint


@pytest.mark.parametrize("kind", ["labelled", "flat", "list", "labelled list"])
def test_index_is_found_again(tmp_path: Path, scans: list[Path], kind: str) -> None:
    touch(tmp_path, ["1.png", "a/2.png"] if kind == "flat" else ["a/1.png", "b/ü 写.png"])
    (tmp_path / "list.txt").write_text("a/1.png\t3\nb/ü 写.png\t1\n" if kind == "labelled list" else "a/1.png\n")
    settle(tmp_path)
    place = str(tmp_path / "list.txt") if "list" in kind else str(tmp_path)
    first = described(open_source(place))
    assert described(open_source(place)) == first
    assert len(scans) == 1


def test_change_in_any_folder_is_seen(tmp_path: Path, scans: list[Path]) -> None:
    touch(tmp_path, ["a/x/1.png", "b/2.png"])
    settle(tmp_path)
    open_source(str(tmp_path))
    touch(tmp_path, ["a/x/3.png"])
    assert names_of(open_source(str(tmp_path)), tmp_path) == ["a/x/1.png", "a/x/3.png", "b/2.png"]
    settle(tmp_path)
    (tmp_path / "b" / "2.png").rename(tmp_path / "b" / "4.png")
    assert names_of(open_source(str(tmp_path)), tmp_path) == ["a/x/1.png", "a/x/3.png", "b/4.png"]
    settle(tmp_path)
    shutil.rmtree(tmp_path / "b")
    assert names_of(open_source(str(tmp_path)), tmp_path) == ["a/x/1.png", "a/x/3.png"]
    assert len(scans) == 4


def test_change_of_a_list_is_seen(tmp_path: Path) -> None:
    touch(tmp_path, ["1.png", "2.png"])
    path = tmp_path / "list.txt"
    path.write_text("1.png\n")
    settle(tmp_path)
    before = path.stat().st_mtime_ns
    assert len(open_source(str(path))) == 1
    path.write_text("1.png\n2.png\n")
    os.utime(path, ns=(before, before))  # Even a change that keeps the time is detected by the size.
    assert len(open_source(str(path))) == 2


def test_folder_still_being_filled_is_not_cached(tmp_path: Path, scans: list[Path]) -> None:
    """Two changes within one tick of a file system's clock have the same modification time."""
    touch(tmp_path, ["1.png"])
    open_source(str(tmp_path))
    stamp = tmp_path.stat().st_mtime_ns
    touch(tmp_path, ["2.png"])
    os.utime(tmp_path, ns=(stamp, stamp))
    assert len(open_source(str(tmp_path))) == 2
    assert len(scans) == 2


@pytest.mark.parametrize("damage", ["torn", "no zip", "other content", "empty"])
def test_damaged_cache_is_made_anew(tmp_path: Path, cache: Path, scans: list[Path], damage: str) -> None:
    touch(tmp_path, ["a/1.png"])
    settle(tmp_path)
    open_source(str(tmp_path))
    (file,) = (cache / "index").iterdir()
    data = file.read_bytes()
    if damage == "other content":
        with file.open("wb") as stream:
            np.savez(stream, something=np.arange(3))
    else:
        file.write_bytes({"torn": data[: len(data) // 2], "no zip": b"\0" * 500, "empty": b""}[damage])
    assert names_of(open_source(str(tmp_path)), tmp_path) == ["a/1.png"]
    assert names_of(open_source(str(tmp_path)), tmp_path) == ["a/1.png"]
    assert len(scans) == 2


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    touch(images, ["a/1.png"])
    settle(images)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(str(images))) == 1


def test_a_cache_is_never_seen_half_written(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, ["1.png"])
    settle(tmp_path)

    def full(file: object, **blocks: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.np, "savez", full)
    assert len(open_source(str(tmp_path))) == 1
    assert list((cache / "index").iterdir()) == []


@pytest.mark.slow
def test_index_of_many_files(tmp_path: Path) -> None:
    """100,000 names in 100 folders are indexed and read from the cache."""
    for number in range(100):
        folder = tmp_path / f"n{number:08}"
        folder.mkdir()
        for i in range(1000):
            (folder / f"n{number:08}_{i}.JPEG").touch()
    for folder in [tmp_path, *tmp_path.iterdir()]:
        os.utime(folder, (0, 0))
    first = open_source(str(tmp_path))
    again = open_source(str(tmp_path))
    assert len(first) == len(again) == 100_000
    assert first.fingerprint == again.fingerprint
    assert again.path(99_999) == str(tmp_path / "n00000099" / "n00000099_999.JPEG")


# Lists in another format


@pytest.mark.parametrize(
    ("suffix", "text", "said"),
    [
        (".txt", "a.png 0\nb.png 1\n", "a space was seen where a tab has to be"),
        (".txt", "a.png;0\n", "a semicolon was seen where a tab has to be"),
        (".txt", "a.png,0\n", "a comma was seen where a tab has to be"),
        (".csv", "a.png;0\n", "a semicolon was seen where a comma has to be"),
        (".csv", "a.png\t0\n", "a tab was seen where a comma has to be"),
        (".tsv", "a.png|0\n", "a bar was seen where a tab has to be"),
        (".txt", "s3://bucket/a.png\n", "it is a URL"),
        (".txt", "gone 1.png\n", r"paths are relative to the list's folder.*\(a space was seen"),
        (".csv", "path,label\na.png,0\n", "'0' is a class number and other lines have names .remove a heading"),
        (".csv", "path,label\na.png,cat\n", "line 1: 'path' looks like a heading"),
        (".csv", "path\na.png\n", "line 1: 'path' looks like a heading"),
        (".csv", "a.png,cat\nb.png,3\n", "line 2: '3' is a class number and other lines have names"),
        (".csv", "a.png,1.5\n", "'1.5' is not a class number"),
        (".csv", "a.png,99999999999\n", "'99999999999' is not a class number"),
        (".txt", "x" * (1 << 17), "a line has more than 65,536 characters"),
        (".csv", '"' + "x\n" * (1 << 17), "field larger than field limit"),
    ],
)
def test_lists_say_what_was_understood(tmp_path: Path, suffix: str, text: str, said: str) -> None:
    touch(tmp_path, ["a.png", "b.png"])
    path = tmp_path / f"list{suffix}"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as refusal:
        open_source(str(path))
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_lists_in_utf_16(tmp_path: Path, encoding: str) -> None:
    touch(tmp_path, ["a.png"])
    (tmp_path / "list.txt").write_bytes("a.png\t0\n".encode(encoding))
    with pytest.raises(DataError, match=r"UTF-16.*save (it|the list) as UTF-8"):
        open_source(str(tmp_path / "list.txt"))


def test_class_names_in_a_list(tmp_path: Path) -> None:
    touch(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "list.tsv").write_text("a.png\tdog\nb.png\ta cat\nc.png\tdog\n")
    source = open_source(str(tmp_path / "list.tsv"))
    assert source.classes == ["a cat", "dog"]
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1]


def test_notes_are_found_again_with_the_index(tmp_path: Path, scans: list[Path]) -> None:
    touch(tmp_path, ["1.png", "2.é"])
    settle(tmp_path)
    first, again = (open_source(str(tmp_path)) for _ in range(2))
    assert first.notes == again.notes != () and len(scans) == 1


def test_rules_have_indices_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, ["1.png", "2.avif"])
    settle(tmp_path)
    for _ in range(2):
        sizes = [len(open_source(str(tmp_path), settings=DataSettings(index_version=v))) for v in (1, 2)]
        assert sizes == [1, 2]
