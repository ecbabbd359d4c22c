"""Tests that files opened in a directory are inside it: nothing is written through links, devices or second names."""

from __future__ import annotations

import errno
import os
import re
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mimae.errors import RunError, UserError
from mimae.outside import files
from mimae.outside.files import Folder, made_beside, write_atomically, write_report

WRITES: dict[str, Callable[[Folder, str], object]] = {
    "append": lambda folder, name: folder.append(name, b"new\n"),
    "replace": lambda folder, name: folder.replace(name, "new\n"),
    "create": lambda folder, name: os.close(folder.create(name)),
    "open": lambda folder, name: os.close(folder.open(name, os.O_RDWR | os.O_CREAT)),
    "folder": lambda folder, name: folder.folder(name),
    "entrust": lambda folder, name: folder.entrust(name),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("precious\n")
    return tmp_path / "victim"


@pytest.mark.parametrize("write", WRITES)
def test_no_link_is_followed(tmp_path: Path, victim: Path, write: str) -> None:
    run = tmp_path / "run"
    (run / "file").symlink_to(victim / "file")
    (run / "images").symlink_to(victim)
    (run / "broken").symlink_to(tmp_path / "made")
    for name in ("file", "images/file", "images/new", "broken"):
        with pytest.raises(OSError, match="symbolic link") as caught:
            WRITES[write](Folder(run), name)
        assert caught.value.filename in (name, f"{name}/.")
    assert [path.name for path in victim.iterdir()] == ["file"] and not (tmp_path / "made").exists()
    assert (victim / "file").read_text() == "precious\n"


def test_a_file_that_cannot_grow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "out.json"
    with pytest.raises(OSError) as caught:
        write_atomically(path, "content")
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"out\.json cannot be written: No space left on device$"):
        write_report(tmp_path, "other.json", "content", path)
    with pytest.raises(UserError, match=r"other\.json cannot be written: No space left on device; --out FILE names"):
        write_report(tmp_path, "other.json", "content", None)


def test_a_library_gets_no_folder_with_a_link_out_of_it(tmp_path: Path, victim: Path) -> None:
    inside = tmp_path / "run/tracker/1/metrics"
    inside.mkdir(parents=True)
    (inside / "loss").touch()
    (inside / "newest").symlink_to("loss")
    (tmp_path / "run/tracker/first").symlink_to("1")
    assert Folder(tmp_path / "run").entrust("tracker") == tmp_path / "run/tracker"
    for name, target in (("rec", victim / "file"), ("folder", victim), ("new", tmp_path / "made")):
        (inside / name).symlink_to(target)
        with pytest.raises(OSError, match=f"tracker/1/metrics/{name} is a symbolic link out of it"):
            Folder(tmp_path / "run").entrust("tracker")
        (inside / name).unlink()


@pytest.mark.parametrize("name", ["../victim/file", "..", "", "images/../../victim/file"])
def test_no_name_leads_outside(tmp_path: Path, victim: Path, name: str) -> None:
    with pytest.raises(OSError, match="not a name inside"):
        Folder(tmp_path / "run").replace(name, "new")
    assert (victim / "file").read_text() == "precious\n"


@pytest.mark.parametrize("write", ["append", "replace", "create", "open"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, victim: Path, write: str) -> None:
    os.mkfifo(tmp_path / "run/fifo")
    (tmp_path / "run/folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(OSError):
            WRITES[write](Folder(tmp_path / "run"), name)
    with pytest.raises(OSError, match="not a regular file"):
        Folder(tmp_path / "run").read("fifo", 10)


@pytest.mark.parametrize("write", ["append", "replace", "create"])
def test_a_second_name_of_a_file_keeps_its_content(tmp_path: Path, victim: Path, write: str) -> None:
    os.link(victim / "file", tmp_path / "run/file")
    WRITES[write](Folder(tmp_path / "run"), "file")
    assert (victim / "file").read_text() == "precious\n"
    expected = {"append": "precious\nnew\n", "replace": "new\n", "create": ""}
    assert (tmp_path / "run/file").read_text() == expected[write]


def test_the_directory_itself_may_be_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    Folder(tmp_path / "link").replace("images/a.png", b"png")
    assert (tmp_path / "run/images/a.png").read_bytes() == b"png"


def test_temporary_names_cannot_be_guessed_and_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, replace = [], os.replace

    def failing(source: str, target: str, **folders: int) -> None:
        names.append(source)
        if len(names) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", failing)
    write_atomically(tmp_path / "file", "1")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", "2")
    assert len({*names}) == 2 and all(re.fullmatch(r"\.file\.[0-9a-f]{16}\.tmp", name) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "1"


def test_what_a_kill_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    for name, age in (("old", 2 * files._STALE), ("young", 0.0)):
        path = tmp_path / f".{name}.0123456789abcdef.tmp"
        path.touch()
        os.utime(path, (0, path.stat().st_mtime - age))
    (tmp_path / ".mine.tmp").touch()
    Folder(tmp_path).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", ".young.0123456789abcdef.tmp"]


def test_a_line_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = Folder(tmp_path), os.write
    (tmp_path / "lines").write_bytes(b"one\ntorn by a cra")
    folder.append("lines", b"two\n")
    calls = []

    def full(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:3])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space") as caught:
        folder.append("lines", b"three\n")
    assert caught.value.filename == "lines"
    monkeypatch.undo()
    folder.append("lines", b"four\n")
    assert (tmp_path / "lines").read_bytes() == b"one\ntorn by a cra\ntwo\nfour\n"


def test_a_renamed_directory_is_followed(tmp_path: Path) -> None:
    told: list[str] = []
    folder = Folder(tmp_path / "a")
    folder.tell = told.append
    folder.make()
    assert not folder.locate() and not told
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()  # Somebody's, by now.
    folder.append("lines", b"one\n")
    assert not folder.locate() and folder.path == tmp_path / "b"
    assert (tmp_path / "b/lines").exists() and not list((tmp_path / "a").iterdir())
    assert len(told) == 1 and f"renamed while training; the run continues in {tmp_path / 'b'}" in told[0]


def test_a_deleted_directory_is_made_anew_with_what_lasts(tmp_path: Path) -> None:
    told: list[str] = []
    folder = Folder(tmp_path / "runs/a")
    folder.tell = told.append
    folder.make()
    folder.replace("config.yaml", "seed: 1", lasting=True)
    folder.replace("latest", "step-1")
    for name in ("config.yaml", "latest"):
        (tmp_path / "runs/a" / name).unlink()
    (tmp_path / "runs/a").rmdir()
    (tmp_path / "runs").rmdir()
    assert folder.locate() and not folder.locate()
    folder.append("lines", b"one\n")
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == ["config.yaml", "lines"]
    assert len(told) == 1 and "deleted while training; it is made again" in told[0]


def test_another_directory_in_the_place_of_a_deleted_one_is_left_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    folder.make()
    (tmp_path / "a").rmdir()
    (tmp_path / "keep").mkdir()  # so that the next one gets another number
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match="another directory by now"):
        folder.locate()
    assert not list((tmp_path / "a").iterdir())


def test_more_than_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**13)
        file.seek(10**13 - 4)
        file.write(b"tail")
    with pytest.raises(OSError, match="10,000,000,000,000 bytes"):
        Folder(tmp_path).read("sparse", 100)
    assert Folder(tmp_path).read("sparse", 6, tail=True) == b"\0\0tail"


def test_a_large_limit_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    tracemalloc.start()
    try:
        assert Folder(tmp_path).read("a", 1 << 32) == b"content"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_threads_that_look_at_once_make_one_directory(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    folder.tell = lambda _: None
    folder.make()
    (tmp_path / "a").rmdir()
    made: list[bool] = []
    threads = [threading.Thread(target=lambda: made.append(folder.locate())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, False, False, True]


# Files and folders that a block makes


def test_what_a_block_makes_gets_its_name_at_the_end(tmp_path: Path) -> None:
    file, folder = tmp_path / "a[1].txt", tmp_path / "b"
    with made_beside(file) as temporary:
        temporary.write_text("new")
        assert not file.exists() and temporary.parent == tmp_path
    with made_beside(folder) as temporary:
        temporary.mkdir()
        (temporary / "inner").touch()
    assert file.read_text() == "new" and (folder / "inner").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a[1].txt", "b"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), made_beside(tmp_path / "a") as temporary:
        make(temporary)
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_leftovers_of_a_kill_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    """The first two are leftovers; the third may belong to a running process. A link is removed, not its target."""
    precious = tmp_path / "precious"
    precious.mkdir()
    old, linked, young = (tmp_path / f".a.{digit * 16}.tmp" for digit in "123")
    old.mkdir()
    linked.symlink_to(precious)
    young.touch()
    (tmp_path / ".a.tmp").symlink_to(precious / "file")
    for path in (old, linked):
        os.utime(path, (0, 0), follow_symlinks=False)
    with made_beside(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, ".a.tmp", "a", "precious"]
    assert not list(precious.iterdir())
