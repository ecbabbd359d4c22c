"""Real folders: other extensions, splits next to each other, links to one another, and the notes about them."""

from __future__ import annotations

import json
import os
import pwd
import time
from pathlib import Path

import pytest
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.pixels.decode import _formats
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.endings import ENDINGS, is_image
from mimae.data.sources.index import cache_folder
from mimae.data.sources.open import absolute_path, open_source
from mimae.data.sources.splits import by_split, split_of
from tests.data.conftest import encoded, photograph, write_images
from tests.data.sources.test_shards import write_tar

FIRST = DataSettings(index_version=1)
"""Settings of runs that name no version of the rules."""


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(source: Source, folder: Path) -> list[str]:
    return [os.path.relpath(source.path(i), folder) for i in range(len(source))]


# Endings


@pytest.mark.parametrize(
    ("name", "by_first", "now"),
    [
        ("a.jpg", True, True),
        ("a.JPEG", True, True),
        ("a.avif", False, True),
        ("a.jfif", False, True),
        ("a.jpg?w=600", False, True),
        ("a.jpg?w=600&q=1.5/x", False, True),
        ("a.jpg:large", False, True),
        ("Who?.png", True, True),
        ("a.jpg~", False, False),
        ("a.jpg.part", False, False),
        ("a.txt?x=.jpg", True, True),  # The part after the last dot is checked first.
        ("a.txt?jpg", False, False),
        ("jpg", False, False),
        ("a.", False, False),
    ],
)
def test_endings_of_images(name: str, by_first: bool, now: bool) -> None:
    assert (is_image(name.encode(), 1), is_image(name.encode())) == (by_first, now)


def test_endings_are_those_of_the_formats_that_are_read() -> None:
    """The extensions agree with Pillow's own list of its formats' extensions."""
    Image.init()
    read = {ending[1:] for ending, name in Image.EXTENSION.items() if name in {*_formats(), "MPO"}}
    assert read - {"pfm"} <= set(ENDINGS[2]), "pfm holds floats, whose range nobody knows"
    assert set(ENDINGS[1]) < set(ENDINGS[2])


def test_other_files_are_counted_by_ending(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.AVIF", "3.jpg?w=6", "a.txt", "b/c.txt", "b/4.heic", "noending", ".hidden")
    source = open_source(str(tmp_path))
    assert names_of(source, tmp_path) == ["1.png", "2.AVIF", "3.jpg?w=6"]
    assert source.notes == (
        "left out, since their extensions are not those of images: 2 .txt, 1 without an extension, 1 .heic",
    )
    old = open_source(str(tmp_path), settings=FIRST)
    assert names_of(old, tmp_path) == ["1.png"] and old.notes == ()


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "00", "01", "deep/x.parquet", "y.tar.gz")
    with pytest.raises(DataError) as refusal:
        open_source(str(tmp_path))
    text = str(refusal.value)
    assert "2 without an extension" in text and "write a list file" in text
    assert f"There are shards in {tmp_path}/deep/; name that folder" in text and "unpack them to .tar" in text


def test_labels_that_are_dropped_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "dog/2.png", "3.png")
    assert open_source(str(tmp_path)).notes == (
        "no sample has a class, since 1 image is next to the folders that would be classes",
    )


# Splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("imagenet1k-validation-07.tar", "validation"),
        ("val_3.tar", "validation"),
        ("TEST.tar", "test"),
        ("dev", "validation"),
        ("trains-1.tar", None),
        ("contest.tar", None),
        ("train-test-1.tar", None),
    ],
)
def test_the_split_that_a_name_tells(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_one_split_alone_is_none() -> None:
    assert by_split(["train-0.tar", "extra-0.tar"]) == {}


@pytest.fixture
def split_shards(tmp_path: Path) -> Path:
    for name in ("train-0", "train-1", "validation-0", "test-0", "test-1"):
        write_tar(tmp_path / f"{name}-of-2.tar", [(f"{name}.png", name.encode())])
    return tmp_path


def test_shards_of_several_splits(split_shards: Path) -> None:
    source = open_source(str(split_shards))
    assert [source.read(i) for i in range(len(source))] == [b"train-0", b"train-1"]
    (note,) = source.notes
    assert f"train is used: {split_shards}/train-*.tar. Others, for example for data.val_path" in note
    assert f"validation: {split_shards}/validation-0-of-2.tar" in note and f"test: {split_shards}/test-*.tar" in note
    held_out = open_source(str(split_shards), use="held-out")
    assert [held_out.read(i) for i in range(len(held_out))] == [b"validation-0"]
    assert len(open_source(str(split_shards), settings=FIRST)) == 5


def test_a_pattern_is_taken_at_its_word(split_shards: Path) -> None:
    source = open_source(f"{split_shards}/*.tar")
    assert len(source) == 5 and source.notes == (
        "the pattern matches files of several splits, and all are used: test, train, validation",
    )
    assert open_source(f"{split_shards}/train-*.tar").notes == ()


def test_splits_without_one_to_train_on(split_shards: Path) -> None:
    for shard in split_shards.glob("train*"):
        shard.unlink()
    with pytest.raises(DataError, match=r"none of them is for training \(train\); name one: .*test-\*.*validation-0"):
        open_source(str(split_shards))


def test_splits_of_parquet_files(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    for name, label in (("train-0", 1), ("test-0", -1)):
        table = pa.table({"image": pa.array([name.encode()]), "label": [label]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = open_source(str(tmp_path))
    assert source.read(0) == b"train-0" and len(source) == 1
    assert source.labels is not None and source.labels.tolist() == [1]


def test_folders_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "meta.txt")
    source = open_source(str(tmp_path))
    assert names_of(source, tmp_path) == ["train/cat/1.png", "train/dog/2.png"] and source.classes == ["cat", "dog"]
    assert "train is used" in source.notes[0] and f"validation: {tmp_path}/val" in source.notes[0]
    assert names_of(open_source(str(tmp_path), use="held-out"), tmp_path) == ["val/cat/3.png"]
    assert len(open_source(str(tmp_path), settings=FIRST)) == 3


def test_classes_that_are_called_like_splits(tmp_path: Path) -> None:
    """One class has photographs of trains."""
    touch(tmp_path, "train/1.png", "test/2.png", "horse/3.png")
    source = open_source(str(tmp_path))
    assert source.classes == ["horse", "test", "train"]
    assert "called like splits of one data set are all used: test, train; if only one is meant" in source.notes[0]


def test_splits_that_are_pooled_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "ILSVRC/Data/train/n01/1.png", "ILSVRC/Data/val/2.png", "ILSVRC/Data/test/3.png", "lists/a.txt")
    assert open_source(str(tmp_path)).notes[-1] == (
        "folders that are called like splits of one data set are all used: ILSVRC/Data/test, ILSVRC/Data/train, "
        f"ILSVRC/Data/val; if only one is meant, name it, as {tmp_path}/ILSVRC/Data/test"
    )
    assert not any("splits" in note for note in open_source(f"{tmp_path}/ILSVRC/Data").notes[1:])
    assert open_source(str(tmp_path), settings=FIRST).notes == ()
    assert open_source(f"{tmp_path}/lists/../ILSVRC/Data/train").notes == ()


def test_shards_below_shards_are_told(tmp_path: Path) -> None:
    (tmp_path / "more/and/more").mkdir(parents=True)
    for name in ("a.tar", "more/b.tar"):
        write_tar(tmp_path / name, [("1.jpg", b"1")])
    source = open_source(str(tmp_path))
    assert len(source) == 1
    assert source.notes[-1] == (
        "left out: 1 shard in folders below, more/b.tar; a mixture or a pattern, such as "
        f"{tmp_path}/*/*.tar, names them"
    )
    stars = open_source(f"{tmp_path}/**/*.tar")
    assert len(stars) == 1 and stars.notes[0].startswith("** in a pattern stands for the names of one level")
    (tmp_path / "more/b.tar").rename(tmp_path / "more/and/more/b.tar")
    write_tar(tmp_path / "more/and/more/c.tar", [("1.jpg", b"1")])
    note = open_source(str(tmp_path)).notes[-1]
    assert note.startswith("left out: 2 shards in folders below, more/and/more/b.tar, more/and/more/c.tar;")
    assert len(open_source(note.split("such as ")[1].removesuffix(", names them"))) == 2


# Links


def test_folders_linked_to_one_another_end(tmp_path: Path) -> None:
    """Twelve folders with links to all others have 13 million paths without a loop. Each is entered by one link."""
    folders = [tmp_path / f"f{i:02}" for i in range(12)]
    for i, folder in enumerate(folders):
        touch(folder, f"{i}.png")
    for folder in folders:
        for other in folders:
            if other != folder:
                (folder / other.name).symlink_to(other)
    began = time.monotonic()
    source = open_source(str(tmp_path))
    assert time.monotonic() - began < 60
    assert len(folders) < len(source) <= 2 * len(folders)
    assert any("links to folders that were already reached by another link" in note for note in source.notes)


# Other paths


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s3://bucket/train", "It is a URL"),
        ("https://example.org/a.tar", "It is a URL"),
        ("hf://datasets/x", "It is a URL"),
        ("pipe:cat x.tar", "It is a URL"),
        ("hf://datasets/{a,b}.tar", "It is a URL"),
        ("a.tar::b.tar", "`::` joins shards in other loaders"),
        ("x.tar y.tar", "one path that contains spaces; to use several sources, write a mixture"),
        ("x.tar,y.tar", "one path that contains commas"),
        ("y.tar;x.tar", "one path that contains semicolons"),
        ("x.tar.gz", "unpack it, for example a .tar.gz to a .tar"),
        ("~nobody-has-this-name/images", "~nobody-has-this-name/images does not exist"),
        ("~nobody-has-this-name/*.tar", "nothing matches .*~nobody-has-this-name"),
        ("torchvision:CIFAR10:~nobody-has-this-name", "torchvision cannot open CIFAR10 under .*~nobody-has-this-name"),
        ("x" * 5000, "is not a path"),
        ("a\0b", "does not exist|is not a path"),
        ("{0..99999999999}.tar", "0.tar does not exist"),
        ("{0..99999999999}{3..1}.tar", "counts backwards"),
        ("{a,b}" * 20 + ".tar", "more than 16 braces"),
        ("{a," * 2000 + "}" * 2000, "more than 16 braces"),
        ("{0.." + "9" * 5000 + "}.tar", "does not exist|is not a path"),
    ],
)
def test_paths_that_are_none_say_what_was_understood(path: str, said: str, tmp_path: Path) -> None:
    touch(tmp_path, "x.tar.gz", "x.tar")
    with pytest.raises(DataError, match=said) as refusal:
        open_source(path, tmp_path)
    assert len(str(refusal.value)) < 20_000


def test_a_user_without_a_home_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    touch(tmp_path, "1.png")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    with pytest.raises(DataError, match=r"no home folder .*, ~/\.cache: set HOME or XDG_CACHE_HOME to a folder"):
        open_source(str(tmp_path))


def test_the_folder_of_indices_may_be_given_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/indices")
    assert cache_folder() == tmp_path / "indices/mimae"
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-has-this-name/indices")
    with pytest.raises(DataError, match="no home folder for indices of data, ~nobody-has-this-name/indices: set"):
        cache_folder()


def test_a_name_like_a_url_is_looked_for_in_the_folder(tmp_path: Path) -> None:
    """A path is relative to the folder of the mixture or recipe, not to the working directory."""
    (tmp_path / "s3:").mkdir()
    touch(tmp_path / "s3:", "1.png")
    assert absolute_path("s3://", Path("/elsewhere")) == "s3://"
    assert absolute_path("s3://", tmp_path) == f"{tmp_path}/s3:"


def test_a_folder_of_img2dataset(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("1.jpg", b"1")])
    touch(tmp_path, "00000.parquet", "00000_stats.json")
    with pytest.raises(DataError, match=rf"open one kind, as {tmp_path}/\*.tar \(img2dataset"):
        open_source(str(tmp_path))
    assert len(open_source(f"{tmp_path}/*.tar")) == 1


@pytest.mark.parametrize("path", ["images", "./images", "list.txt", "{00..07}.tar", "torchvision:CIFAR10:cifar:test"])
def test_absolute_paths_name_the_same_source(path: str, tmp_path: Path) -> None:
    found = absolute_path(path, tmp_path)
    assert str(tmp_path) in found and absolute_path(found, Path("/elsewhere")) == found
    assert absolute_path("photos", tmp_path) == "photos"


# Sizes that files claim


def test_a_sample_larger_than_the_bound_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 8 TB takes no space on the disk, but reading it would take all memory."""
    write_images(tmp_path / "i", ["1.png"])
    with (tmp_path / "i/2.png").open("wb") as file:
        file.truncate(8 << 40)
    source = open_source(str(tmp_path / "i"))
    assert source.read(0)
    with pytest.raises(OSError, match=r"8,796,093,022,208 bytes, more than data.max_bytes = 400,000,000"):
        source.read(1)
    small = open_source(str(tmp_path / "i"), settings=DataSettings(max_bytes=100))
    with pytest.raises(OSError, match=r"more than data.max_bytes = 100"):
        small.read(0)


def test_a_member_larger_than_the_bound_is_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.png", bytes(3000)), ("2.png", bytes(90))])
    source = open_source(str(path), settings=DataSettings(max_bytes=100))
    assert len(source.read(1)) == 90
    with pytest.raises(OSError, match=r"3,000 bytes, more than data.max_bytes = 100"):
        source.read(0)


@pytest.mark.parametrize("name", ["x.txt", "x.yaml", "x.tar", "x.parquet"])
def test_sparse_files_are_refused_at_once(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(8 << 40)
    began = time.process_time()
    try:
        found = open_source(str(tmp_path / name))
    except DataError:
        pass
    else:
        with pytest.raises(OSError, match="cut off"):
            found.read(0)
    assert time.process_time() - began < 20


def test_names_of_files_are_printable_in_what_is_said(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m\n"
    os.mkdir(folder)
    with pytest.raises(DataError) as refusal:
        open_source(os.fsdecode(folder))
    text = str(refusal.value)
    assert "caf\\udce9\\x1b[31m\\n contains no images" in text and text.replace("\n", "").isprintable()
    with open(folder + b"/\x9b.jpg", "wb") as file:
        file.write(encoded(photograph(0, 8, 8), "JPEG"))
    assert json.dumps(open_source(os.fsdecode(folder)).notes) == "[]"
