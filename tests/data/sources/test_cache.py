"""The cache of samples returns what the source has, whichever process fills it and whatever happens to its files."""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mimae.data.loading.batch import DataError
from mimae.data.loading.loader import evaluation_batches, make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources import cache
from mimae.data.sources.base import Source
from mimae.data.sources.cache import Cached, Fullness, cache_folder_of, cache_note, cached
from mimae.data.sources.open import open_source
from tests.data.conftest import encoded, photograph, write_images

IMAGES = 12


@pytest.fixture(autouse=True)
def any_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cache fill all of the file system, so that the tests do not depend on how full this machine's is."""
    monkeypatch.setattr(cache, "SPARE", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files of two image sizes in PNG and JPEG: one rotated by EXIF, one grey, one that is not an image."""
    folder = tmp_path / "images"
    write_images(folder, [f"{i:02}.png" for i in range(IMAGES)])
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "03.jpg").write_bytes(encoded(photograph(3, 20, 30), "JPEG", quality=90, exif=exif))
    (folder / "04.png").write_bytes(encoded(photograph(4, 20, 30)[..., 0]))
    (folder / "05.png").write_bytes(b"no image")
    (folder / "03.png").unlink()
    return folder


def settings(tmp_path: Path, cache: str | None = "encoded", **more: Any) -> DataSettings:
    fixed = {"image_size": (16, 24), "workers": 0, "max_bad_fraction": 1.0, "cache_dir": str(tmp_path / "kept")}
    return DataSettings(cache=cache, **(fixed | more))


class Counted:
    """A source that counts how often each sample is read."""

    def __init__(self, source: Source) -> None:
        self.source, self.reads = source, Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> bytes:
        self.reads[i] += 1
        return self.source.read(i)


def test_each_sample_is_asked_for_once_by_all_who_open_the_cache(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    counted = Counted(source)
    first, second = (Cached(settings(tmp_path), counted) for _ in range(2))
    for i in range(IMAGES):
        reader = (first, second)[i % 2]
        assert reader.read(i) == first.read(i) == second.read(i) == source.read(i)
    assert counted.reads == Counter(range(IMAGES))
    assert Cached(settings(tmp_path), counted).read(7) == source.read(7)
    assert counted.reads[7] == 1
    # The file contains the bytes of each sample once and nothing else.
    data = cache_folder_of(settings(tmp_path), source) / "data"
    assert data.stat().st_size == sum(len(source.read(i)) for i in range(IMAGES))
    with pytest.raises(IndexError):
        first.read(-1)


def test_it_is_the_source_but_for_reading(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    wrapped = Cached(settings(tmp_path), source)
    assert (wrapped.name, wrapped.fingerprint, len(wrapped)) == (source.name, source.fingerprint, len(source))
    assert (wrapped.labels, wrapped.classes, wrapped.path(3)) == (source.labels, source.classes, source.path(3))
    assert wrapped.shares[0][:2] == source.shares[0][:2]
    assert cached(settings(tmp_path, None), source) is source
    with pytest.raises(TypeError):
        pickle.dumps(wrapped)  # In another process the file descriptors would refer to other files.


@pytest.mark.parametrize("kind", ["encoded", "decoded"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_without_a_cache(folder: Path, tmp_path: Path, kind: str, workers: int) -> None:
    """Batches are equal while the cache fills and from it, with bad samples and replacements.

    All images are decoded by Pillow, so equality is bit for bit.
    """
    (folder / "03.jpg").rename(folder / "03.tiff")
    turned = ImageOps.exif_transpose(Image.open(folder / "03.tiff"))
    turned.save(folder / "03.tiff", "TIFF")
    source = open_source(str(folder))
    plain = make_loader(settings(tmp_path, None), source, seed=1, batch_size=4)
    loader = make_loader(settings(tmp_path, kind, workers=workers), source, seed=1, batch_size=4)
    for epoch in (0, 1):
        for with_cache, without in zip(loader.epoch(epoch), plain.epoch(epoch), strict=True):
            assert torch.equal(with_cache.images, without.images)
            assert torch.equal(with_cache.source_ids, without.source_ids)
            assert with_cache.bad == without.bad
    loader.close()
    assert (cache_folder_of(settings(tmp_path, kind), source) / "data").stat().st_size > 0


def test_decoded_samples_are_upright_pixels(folder: Path, tmp_path: Path) -> None:
    """The first and later reads are equal. Other readers see the image upright; bytes of no image are unchanged."""
    source = open_source(str(folder))
    wrapped = Cached(settings(tmp_path, "decoded"), source)
    for i in (0, 3, 4):
        once = wrapped.read(i)
        assert wrapped.read(i) == once
        whole = ImageOps.exif_transpose(Image.open(io.BytesIO(source.read(i)))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(once))), np.asarray(whole))
    assert Image.open(io.BytesIO(wrapped.read(3))).size == (20, 30)
    assert wrapped.read(5) == b"no image"


def test_evaluation_leaves_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    list(evaluation_batches(settings(tmp_path), source, 4))
    assert not (tmp_path / "kept").exists()


def test_two_sets_that_number_alike_have_two_caches(folder: Path, tmp_path: Path) -> None:
    """A copy under the same names, for example of resized images, has the same fingerprint but other pixels."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "00.png").write_bytes(encoded(photograph(99, 8, 8)))
    one, other = open_source(str(folder)), open_source(str(tmp_path / "copy"))
    assert one.fingerprint == other.fingerprint
    assert Cached(settings(tmp_path), one).read(0) == one.read(0)
    assert Cached(settings(tmp_path), other).read(0) == other.read(0) != one.read(0)
    assert cache_folder_of(settings(tmp_path), one) != cache_folder_of(settings(tmp_path, "decoded"), one)


# Many processes


def read_all(wrapped: Cached, start: int, results: Any) -> None:
    order = [(start + i) % IMAGES for i in range(IMAGES)]
    results.put([(i, wrapped.read(i)) for i in order])


def test_many_processes_fill_it_at_once(folder: Path, tmp_path: Path) -> None:
    """Six processes, forked from one that has the cache open, fill it in two orders: each sample once, none damaged."""
    source = open_source(str(folder))
    wrapped = Cached(settings(tmp_path), source)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    readers = [fork.Process(target=read_all, args=(wrapped, start % 3, results)) for start in range(6)]
    for reader in readers:
        reader.start()
    for _ in readers:
        for i, data in results.get():
            assert data == source.read(i)
    for reader in readers:
        reader.join()
    data = cache_folder_of(settings(tmp_path), source) / "data"
    assert data.stat().st_size == sum(len(source.read(i)) for i in range(IMAGES))


def test_a_sample_that_another_process_kept_meanwhile_is_not_kept_again(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    other = Cached(settings(tmp_path), source)

    class Slow(Counted):
        def read(self, i: int) -> bytes:
            other.read(i)
            return super().read(i)

    assert Cached(settings(tmp_path), Slow(source)).read(0) == source.read(0)
    assert (cache_folder_of(settings(tmp_path), source) / "data").stat().st_size == len(source.read(0))


def test_only_one_at_a_time_appends(folder: Path, tmp_path: Path) -> None:
    wrapped = Cached(settings(tmp_path), source := open_source(str(folder)))
    data = cache_folder_of(settings(tmp_path), source) / "data"
    reader = threading.Thread(target=wrapped.read, args=(0,))
    with data.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reader.start()
        reader.join(0.2)
        assert reader.is_alive() and data.stat().st_size == 0
    reader.join()
    assert data.stat().st_size == len(source.read(0))


# Damage


class Kept(NamedTuple):
    """A filled cache, its source and its two files."""

    source: Counted
    cache: Cached
    entries: Path
    data: Path


@pytest.fixture
def kept(folder: Path, tmp_path: Path) -> Iterator[Kept]:
    source = Counted(open_source(str(folder)))
    wrapped = Cached(settings(tmp_path), source)
    for i in range(IMAGES):
        wrapped.read(i)
    source.reads.clear()
    place = cache_folder_of(settings(tmp_path), source)
    yield Kept(source, wrapped, place / "index", place / "data")


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


ENTRY = 32 + 2 * 16  # The entry of sample 2.


@pytest.mark.parametrize(
    ("at", "content"),
    [
        (ENTRY, b"\1"),  # another offset
        (ENTRY, b"\xff" * 8),  # an offset before the file
        (ENTRY, b"\xff" * 7 + b"\x7f"),  # an offset after the end of any file
        (ENTRY + 8, b"\xff" * 4),  # 4 GB
        (ENTRY + 12, b"\0" * 4),  # another CRC
        (ENTRY, b"\0" * 8 + b"\1"),  # another offset and length, as if the entry were being written
    ],
)
def test_a_damaged_entry_is_read_again_and_mended(kept: Kept, at: int, content: bytes) -> None:
    overwrite(kept.entries, at, content)
    for _ in range(2):
        for i in range(IMAGES):
            assert kept.cache.read(i) == kept.source.source.read(i)
    assert kept.source.reads == {2: 1}


def test_damaged_and_lost_data_are_read_again_and_mended(kept: Kept) -> None:
    size = kept.data.stat().st_size
    overwrite(kept.data, 10, b"damaged")
    os.truncate(kept.data, size - 1)  # cuts the sample that was added last
    for _ in range(2):
        for i in range(IMAGES):
            assert kept.cache.read(i) == kept.source.source.read(i)
    assert kept.source.reads == {0: 1, IMAGES - 1: 1}


@pytest.mark.parametrize("foreign", ["other", "short", "empty"])
def test_an_index_of_another_kind_is_replaced_with_its_data(kept: Kept, tmp_path: Path, foreign: str) -> None:
    if foreign == "other":
        overwrite(kept.entries, 0, b"something else")
    else:
        os.truncate(kept.entries, {"short": 100, "empty": 0}[foreign])
    again = Cached(settings(tmp_path), kept.source)
    assert kept.data.stat().st_size == 0
    assert [again.read(i) for i in range(IMAGES)] == [kept.source.source.read(i) for i in range(IMAGES)]
    assert kept.source.reads == Counter(range(IMAGES))


def test_removed_while_it_is_in_use(kept: Kept, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A removed cache serves its samples while it is open. It writes nothing to a cache that another run made since."""
    overwrite(kept.entries, ENTRY, b"\1")
    shutil.rmtree(kept.data.parent)
    assert kept.cache.read(1) == kept.source.source.read(1) and not kept.source.reads
    other = Cached(settings(tmp_path), kept.source)
    assert kept.cache.read(2) == kept.source.source.read(2)
    assert "takes no more samples, and the run continues: it was removed" in capfd.readouterr().err
    assert kept.data.stat().st_size == 0
    assert other.read(2) == kept.source.source.read(2)


# Room


class Room:
    """A file system of 1000 blocks of 100 bytes, some of which are free."""

    f_frsize, f_blocks = 100, 1000

    def __init__(self, free: int) -> None:
        self.f_bavail = free


def test_a_full_disk_ends_the_filling_with_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A tenth of the file system stays free. Two readers print one line. A run with room again fills the cache."""
    counted = Counted(open_source(str(folder)))
    monkeypatch.setattr(cache, "SPARE", 0.1)
    monkeypatch.setattr(os, "statvfs", lambda _: Room(101))  # 100 bytes above a tenth: less than an image.
    readers = [Cached(settings(tmp_path), counted) for _ in range(2)]
    for reader in readers * 2:
        for i in range(IMAGES):
            assert reader.read(i) == counted.source.read(i)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "10% of the file system stay free" in said
    assert counted.reads[0] == 4
    fullness = Fullness(settings(tmp_path), counted)
    told = fullness.verdict() or ""
    assert f"the cache is too small: data.cache=encoded holds 0 of {IMAGES} samples" in told and "cache_dir" in told
    assert fullness.verdict() is None, "it is told once"
    monkeypatch.setattr(os, "statvfs", lambda _: Room(50))
    full = Cached(settings(tmp_path), counted)
    full.read(0)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(os, "statvfs", lambda _: Room(1000))
    later = Cached(settings(tmp_path), counted)
    before = counted.reads[0]
    assert later.read(0) == later.read(0)
    assert counted.reads[0] == before + 1


def test_a_write_that_is_cut_short_leaves_nothing(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files have at most 1,000 bytes, as with a quota. The limit is set in a separate process."""
    source = open_source(str(folder))
    wrapped = Cached(settings(tmp_path), source)

    def limited(results: Any) -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        results.put([wrapped.read(i) == source.read(i) for i in range(IMAGES)])

    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    process = fork.Process(target=limited, args=(results,))
    process.start()
    assert all(results.get())
    process.join()
    assert capfd.readouterr().err.count("takes no more samples") == 1
    assert (cache_folder_of(settings(tmp_path), source) / "data").stat().st_size == 0


def test_folders_that_cannot_be_used_are_told(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache=encoded cannot use .*Not a directory.*data.cache_dir"):
        Cached(settings(tmp_path, cache_dir=str(tmp_path / "file")), source)
    place = cache_folder_of(settings(tmp_path), source).parent
    place.mkdir(parents=True)
    place.chmod(0o777)
    with pytest.raises(DataError, match="can be written by other users"):
        Cached(settings(tmp_path), source)


def test_the_note_has_the_size_and_how_to_remove_it(kept: Kept, tmp_path: Path) -> None:
    os.truncate(kept.data, 2_340_000_000)
    note = cache_note(settings(tmp_path), kept.source)
    assert "2,340 MB are kept" in note and note.endswith(f"rm -r {kept.data.parent}")
