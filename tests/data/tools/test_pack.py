"""`mimae data pack`: the shards have the same samples, and are complete or absent whenever packing is interrupted."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimae import cli
from mimae.data.loading.batch import DataError
from mimae.data.pixels import jpeg
from mimae.data.sources.open import open_source
from mimae.data.tools import pack
from mimae.data.tools.pack import Packing
from tests.data.conftest import encoded, photograph, write_images

LIMIT = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", [f"{i % 3}/{i}.png" for i in range(7)], 40, 60)
    return tmp_path / "images"


def packing(folder: Path, samples: int = 3, shortest: int | None = None) -> Packing:
    return Packing(open_source(str(folder)), folder.parent / "out" / "t.tar", samples, shortest, LIMIT)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_hold_the_same_bytes_and_labels(folder: Path) -> None:
    source = open_source(str(folder))
    assert pack.pack(packing(folder), workers=2) == (3, 0)
    packed = open_source(str(folder.parent / "out"))
    assert [packed.read(i) for i in range(7)] == [source.read(i) for i in range(7)]
    assert packed.labels is not None and source.labels is not None
    assert packed.labels.tolist() == source.labels.tolist()
    assert packed.shares[0].blocks.tolist() == [0, 3, 6, 7]
    with tarfile.open(folder.parent / "out" / "t-00001.tar") as tar:
        assert tar.getnames() == [f"00000000{i}.{ending}" for i in (3, 4, 5) for ending in ("png", "cls")]
    assert names(folder.parent / "out") == [
        *(".t.lock", "t-00000.tar", "t-00001.tar", "t-00002.tar", "t.bad_samples.jsonl", "t.json")
    ]


def test_images_are_resized_to_a_shortest_side(folder: Path) -> None:
    """Resized images are rotated by EXIF and antialiased. Images that are small enough keep their bytes."""
    large = photograph(50, 300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "0" / "0.png").write_bytes(encoded(np.ascontiguousarray(np.rot90(large)), "PNG", exif=exif))
    pack.pack(packing(folder, shortest=40), workers=1)
    packed = open_source(str(folder.parent / "out"))
    image = Image.open(io.BytesIO(packed.read(0)))
    assert (image.format, image.size) == ("JPEG", (40, 60))
    expected = Image.fromarray(large).resize((40, 60), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 3
    assert packed.read(1) == open_source(str(folder)).read(1)


@pytest.mark.skipif(jpeg.obstacle() is not None, reason=str(jpeg.obstacle()))
def test_lossless_shards_have_the_same_pixels(folder: Path) -> None:
    """JPEGs are transcoded, other images copied. A packing goes on with the option that it began with."""
    progressive = encoded(photograph(50, 40, 60), "JPEG", progressive=True)
    (folder / "0" / "0.png").write_bytes(progressive)
    source, job = open_source(str(folder)), packing(folder)._replace(lossless=True)
    pack.pack(job, workers=1)
    packed = open_source(str(folder.parent / "out"))
    assert jpeg.header(packed.read(0)) == (40, 60, 1) and jpeg.header(progressive) is None
    before, after = (np.asarray(Image.open(io.BytesIO(each.read(0)))) for each in (source, packed))
    assert np.array_equal(before, after)
    assert [packed.read(i) for i in range(1, 7)] == [source.read(i) for i in range(1, 7)]
    assert pack.pack(job, workers=1) == (0, 0)
    with pytest.raises(DataError, match=r"\(lossless differ\)"):
        pack.pack(packing(folder), workers=1)


@pytest.mark.parametrize("shortest", [None, 8])
def test_samples_that_cannot_be_used_are_left_out_and_listed(folder: Path, shortest: int | None) -> None:
    """Later samples keep their numbers. Without resizing only headers are checked."""
    (folder / "0" / "3.png").write_bytes(b"no image")
    (folder / "1" / "4.png").write_bytes(encoded(photograph(0, 40, 60))[:2000])
    (folder / "2" / "2.png").unlink()
    (folder / "2" / "2.png").symlink_to("gone")
    job = packing(folder, samples=2, shortest=shortest)
    bad = {1: "begins with", 4: "truncated", 5: "No such file"}
    if shortest is None:
        del bad[4]
    assert pack.pack(job, workers=1) == (4, len(bad))
    out = folder.parent / "out"
    listed = [json.loads(line) for line in (out / "t.bad_samples.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == list(bad)
    for entry in listed:
        assert entry["path"] == job.source.path(entry["id"]) and bad[entry["id"]] in entry["reason"]
    kept = [i for i in range(7) if i not in bad]
    packed = open_source(str(out))
    assert [int(Path(packed.path(i)).stem) for i in range(len(packed))] == kept
    # Packing is complete: nothing is written, and the list stays.
    assert pack.pack(job, workers=1) == (0, len(bad))


def test_packing_goes_on_with_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "0" / "0.png").write_bytes(b"no image")
    (folder / "2" / "5.png").write_bytes(b"no image")
    job = packing(folder)
    out = folder.parent / "out"
    pack.pack(job, workers=1)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    # As if killed while the second shard was written, with the other shards complete and their lists not merged.
    (out / "t-00001.tar").unlink()
    # Temporary files of this version, and of earlier ones.
    for left in ("t-00001.tar", ".t-00001.tar.jsonl", "t.json", "t.bad_samples.jsonl"):
        for unique in (".0123456789abcdef", ".4711", ""):
            (out / f".{left}{unique}.tmp").write_bytes(b"half")
    untouched = (out / "t-00000.tar").stat().st_mtime_ns
    assert pack.pack(job, workers=1) == (1, 2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert (out / "t-00000.tar").stat().st_mtime_ns == untouched


def test_list_forgets_what_a_shard_written_anew_holds(folder: Path) -> None:
    """Samples that were unreadable for a moment, as on a network, are packed when their shard is written again."""
    job, out = packing(folder), folder.parent / "out"
    image = (folder / "2" / "5.png").read_bytes()
    for name in ("0/0.png", "2/5.png"):
        (folder / name).write_bytes(b"no image")
    assert pack.pack(job, workers=1) == (3, 2)
    (out / "t-00002.tar").unlink()  # The shard of the last sample, 2/5.png.
    (folder / "2" / "5.png").write_bytes(image)
    assert pack.pack(job, workers=1) == (1, 1)
    (line,) = (out / "t.bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("0/0.png")


def test_a_packing_that_is_under_way_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one may have process ids of its own, in a container or on another host."""
    job, out = packing(folder), folder.parent / "out"
    again: list[DataError] = []

    def gather(packing: Packing) -> int:
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(DataError, match="another packing writes shards under this name") as refused:
            pack.pack(job, workers=1)
        again.append(refused.value)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        return real(packing)

    real = pack._gather
    monkeypatch.setattr(pack, "_gather", gather)
    half = out / ".t2-00000.tar.tmp"
    out.mkdir()
    half.write_bytes(b"of a packing of another name")
    assert pack.pack(job, workers=1) == (3, 0) and len(again) == 1
    assert half.exists()
    monkeypatch.setattr(pack, "_gather", real)
    assert pack.pack(job, workers=1) == (0, 0)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packing says that there is no lock, and removes no file that another packing may be writing."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    job, out = packing(folder), folder.parent / "out"
    out.mkdir()
    other = out / ".t-00001.tar.0123456789abcdef.tmp"
    other.write_bytes(b"of another packing")
    os.utime(other, (0, 0))  # It waits for slow storage.
    with monkeypatch.context() as without:
        without.setattr(fcntl, "flock", flock)
        assert pack.pack(job, workers=1) == (3, 0)
    assert capsys.readouterr().err.count(".t.lock cannot be locked") == 1
    assert other.read_bytes() == b"of another packing"
    assert pack.pack(job, workers=1) == (0, 0) and not other.exists()


def test_two_packings_at_once_mix_no_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have locks that other hosts do not see."""
    job, out = packing(folder), folder.parent / "out"
    pack.pack(job, workers=1)
    shard, add, seen = out / "t-00000.tar", pack._add, list[bytes]()
    whole = shard.read_bytes()
    shard.unlink()

    def twice(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        add(tar, name, data)
        if name == "000000001.png" and not seen:
            tar.fileobj.flush()  # type: ignore[attr-defined]
            seen.append(b"")
            pack._write_shard(job, 0)
            seen.append(shard.read_bytes())

    monkeypatch.setattr(pack, "_add", twice)
    pack._write_shard(job, 0)
    assert seen[1] == whole and shard.read_bytes() == whole


def test_the_record_is_on_disk_before_the_first_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power there is no shard without its record: both the file and its name were flushed."""
    out, flushed, fsync = folder.parent / "out", list[int](), os.fsync

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    def over(*_: object, **__: object) -> list[None]:
        assert flushed == [(out / "t.json").stat().st_ino, out.stat().st_ino]
        return []

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(pack, "over", over)
    assert pack.pack(packing(folder), workers=1) == (3, 0)


def refuse_writing(monkeypatch: pytest.MonkeyPatch, folder: Path, only: str = "") -> None:
    """Refuse to open files for writing in a folder, or only one of them, as for another user without that right."""
    real = os.open

    def open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        named = Path(os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else "") / os.fsdecode(path)
        if named.parent == folder and named.name.endswith(only) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open)


def test_another_user_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is writable for the group, but the record and the lock only for the user who began."""
    job, out = packing(folder), folder.parent / "out"
    pack.pack(job, workers=1)
    (out / "t-00001.tar").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as foreign:
        for name in ("t.json", ".t.lock"):
            refuse_writing(foreign, out, only=name)
        with (out / ".t.lock").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(DataError, match="another packing writes shards under this name"):
                pack.pack(job, workers=1)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert pack.pack(job, workers=1) == (1, 0)


@pytest.mark.parametrize("is_locked_before", [True, False])
def test_complete_shards_in_a_read_only_folder(
    folder: Path, is_locked_before: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing has to be written. Shards of an earlier version have no lock file."""
    job, out = packing(folder), folder.parent / "out"
    pack.pack(job, workers=1)
    capsys.readouterr()
    if not is_locked_before:
        (out / ".t.lock").unlink()
    refuse_writing(monkeypatch, out)
    assert pack.pack(job, workers=1) == (0, 0)
    assert "lock" not in capsys.readouterr().err
    (out / "t.bad_samples.jsonl").unlink()
    with pytest.raises(DataError, match="Permission denied"):
        pack.pack(job, workers=1)


def test_names_sort_as_the_shards_follow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = packing(folder, samples=1)
    monkeypatch.setattr(type(job.source), "__len__", lambda self: 100_001)
    assert [job.shard(number).name for number in (99_999, 100_000)] == ["t-099999.tar", "t-100000.tar"]


def test_jpeg_that_would_be_too_long_is_left_out(folder: Path) -> None:
    Image.new("L", (131_100, 2)).save(folder / "0" / "0.png")
    assert pack.pack(packing(folder, shortest=1), workers=1) == (3, 1)
    assert "2 x" not in (said := (folder.parent / "out" / "t.bad_samples.jsonl").read_text()) and "1 x 65550" in said


def test_other_shards_under_the_name_are_left_alone(folder: Path) -> None:
    out = folder.parent / "out"
    pack.pack(packing(folder), workers=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (packing(folder, samples=4), packing(folder, shortest=8)):
        with pytest.raises(DataError, match=r"t.json records other shards under this name \((samples_of|shortest)"):
            pack.pack(other, workers=1)
    (folder / "0" / "new.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"\(source, samples differ\)"):
        pack.pack(packing(folder), workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for text in ("[]", before["t.json"].decode()[:50]):
        (out / "t.json").write_text(text)
        with pytest.raises(DataError, match=r"is not the record of a packing, or is damaged.*remove it and its shards"):
            pack.pack(packing(folder), workers=1)
    (out / "t.json").write_text("")
    for _ in range(2):  # The refusal removes nothing.
        with pytest.raises(DataError, match=r"t-00000.tar exists but t.json.* is missing or empty"):
            pack.pack(packing(folder), workers=1)
        assert (out / "t.json").exists()
    (out / "t.json").unlink()
    with pytest.raises(DataError, match=r"t-00000.tar exists but t.json.* is missing or empty"):
        pack.pack(packing(folder), workers=1)
    assert not (out / "t.json").exists()


@pytest.mark.parametrize("ending", ["png", "cls", "list"])
def test_full_disk(folder: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing unfinished of the second shard stays on the disk. Packing goes on when there is room."""
    out, job = folder.parent / "out", packing(folder)
    add, write_atomically = pack._add, pack.write_atomically

    def full(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        add(tar, name, data)
        if name == f"000000003.{ending}":
            raise OSError(28, "No space left on device")

    def full_list(path: Path, content: str | bytes) -> None:
        if ending == "list" and path.name == ".t-00001.tar.jsonl":
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    with monkeypatch.context() as filled:
        filled.setattr(pack, "_add", full)
        filled.setattr(pack, "write_atomically", full_list)
        with pytest.raises(DataError, match=r"failed: No space left on device.*same command writes the others"):
            pack.pack(job, workers=1)
    assert (out / "t-00000.tar").exists()
    assert not [name for name in names(out) if name.endswith(".tmp") or "t-00001" in name]
    assert pack.pack(job, workers=1)[1] == 0
    assert len(open_source(str(out))) == 7 and [path.name for path in out.glob(".*")] == [".t.lock"]


def test_a_record_for_which_there_is_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it would not be a record. A kill could leave it too, if the file was written in place."""
    job, soft, hard = packing(folder), *resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as long:
        long.setattr(pack, "_record", lambda packing: {"long": "x" * 10_000})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(DataError, match="File too large"):
                pack.pack(job, workers=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder.parent / "out") == [".t.lock"]
    (folder.parent / "out" / "t.json").touch()  # An earlier version left this if it was killed at its start.
    assert pack.pack(job, workers=1) == (3, 0)


STOPPING = """
import sys, time
from pathlib import Path
from mimae.data.sources.open import open_source
from mimae.data.tools import pack
from mimae.data.tools.pack import Packing
add = pack._add
def stopping(tar, name, data):
    add(tar, name, data)
    if name == "000000004.png":
        print(name, flush=True)
        time.sleep(100)
pack._add = stopping
source, out = sys.argv[1:]
pack.pack(Packing(open_source(source), Path(out) / "t.tar", 3, None, 1000000), workers=1)
"""


def test_killed_while_it_writes(folder: Path) -> None:
    """After a kill in the second shard, only the first shard exists as complete, and no process stays."""
    out = folder.parent / "out"
    command = [sys.executable, "-c", STOPPING, str(folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "000000004.png\n"
        process.send_signal(signal.SIGKILL)
        # This ends when the last process that could write to it has ended.
        process.stdout.read()
    assert [path.name for path in out.glob("t-*.tar")] == ["t-00000.tar"]
    assert pack.pack(packing(folder), workers=1) == (2, 0)
    packed, source = open_source(str(out)), open_source(str(folder))
    assert [packed.read(i) for i in range(7)] == [source.read(i) for i in range(7)]


def test_the_verb(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def launch(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mimae", "data", "pack", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0)

    out = folder.parent / "a" / "b"
    assert launch(str(folder), str(out / "t.tar"), "--samples", "4", "--shortest", "16", "--workers", "1") == 0
    assert capsys.readouterr().out == f"{out}/t-00000.tar to t-00001.tar: 2 written, 0 already there\n"
    assert Image.open(io.BytesIO(open_source(str(out)).read(0))).size == (24, 16)
    assert launch(str(folder), str(out)) == 2
    assert "cannot name the shards: give DIR/NAME.tar" in capsys.readouterr().err
    for inside in (folder / "t.tar", folder / "new" / "t.tar", out / ".." / ".." / "images" / "t.tar"):
        assert launch(str(folder), str(inside)) == 2
        assert f"is inside {folder}, which could then not be opened" in capsys.readouterr().err
    assert launch("~nobody-has-this-name/images", str(out / "t.tar")) == 2
    assert "~nobody-has-this-name/images does not exist" in capsys.readouterr().err
    with jpeg.unused():
        assert launch(str(folder), str(out / "u.tar"), "--lossless") == 2
    assert "--lossless needs libjpeg-turbo" in capsys.readouterr().err
    assert launch(str(folder), str(out / "u.tar"), "--lossless", "--shortest", "9") == 2
    assert "give one of the two" in capsys.readouterr().err
