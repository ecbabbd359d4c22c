"""Tests of what `mimae status` reports about a run at each point of its life."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

import mimae
from mimae.errors import UserError
from mimae.faults import lock
from mimae.tools import status


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has done two of four steps, where a limit of the schedule stopped it."""
    folder = tmp_path_factory.mktemp("status") / "run"
    settings = {"workers": 0, "loader": "torch", "val_path": None}
    quiet = {"tensorboard": False, "images_every_epochs": 0, "probe_every_epochs": 0, "log_every_steps": 1}
    mimae.pretrain(
        "quickstart", "schedule.batch_size=8", "schedule.max_steps=4", "checkpoint.every_steps=2",
        run={"dir": str(folder)}, data=settings, telemetry=quiet,
    )  # fmt: skip
    return folder


def test_a_finished_run(run: Path) -> None:
    told = status.look(run)
    assert told["state"] == "finished after 4 steps"
    assert told["step"].startswith("4, 0.01 epochs, ") and told["saved"].startswith("step-00000004, ")
    assert "images/s" in told["speed"] and "rec" in told["losses"] and "unreadable" not in told


def test_a_run_that_was_killed_after_its_last_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000004")
    (run / "latest").write_text("step-00000002\n")
    assert "resumes from step 2 of 4, and repeats the 2 after it" in status.look(run)["state"]
    (run / "bad_samples.jsonl").write_text(json.dumps({"id": 1}) + "\n")
    assert status.look(run)["unreadable"].startswith("1, listed")


def test_numbers_that_no_run_writes_are_left_out(run: Path, tmp_path: Path) -> None:
    """JSON has integers of any size."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 10**400, "rec": 0.5, "epoch": 10**400, "data_wait": True}) + "\n")
        file.write(json.dumps({"step": 10**400, "loss": 0.1}) + "\n")
    told = status.look(run)
    assert told["step"].startswith("3, ") and "epochs" not in told["step"]
    assert "rec 0.500" in told["losses"] and "loss" not in told["losses"] and "speed" not in told


def test_a_run_at_work_names_its_process(run: Path) -> None:
    with lock.lock(run):
        assert status.look(run)["state"] == f"running, process {os.getpid()} on {socket.gethostname()}"
    assert "not running" in status.look(run)["state"]


def test_a_run_at_work_on_another_host_is_seen_by_its_counter(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "lock").write_text(json.dumps(lock.Owner("node7", "another boot", 4242, "token")._asdict()))
    for is_moving, told in ((True, "running, process 4242 on node7"), (False, "not running")):
        monkeypatch.setattr(lock, "moves", lambda file, answer=is_moving: answer)
        assert status.look(run)["state"].startswith(told)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        status.look(tmp_path)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage; step 2 of 4 is saved."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/lock").write_text("")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "step-00000002, "),
        (b"", "is missing or empty, and is not needed"),
        (b"\xff\xfe\x1b[2J", "which does not exist"),
        (b"step-00000009", "latest names step-00000009, which does not exist"),
        (b"../../victim", "latest names ../../victim, which does not exist"),
    ],
)
def test_the_pointer_in_every_state(copy: Path, content: bytes | None, told: str) -> None:
    (copy / "latest").unlink()
    if content is not None:
        (copy / "latest").write_bytes(content)
    found = status.look(copy)
    assert "resumes from step 2 of 4" in found["state"] and told in found["saved"]
    assert "\x1b" not in "".join(found.values())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": "x"}', '{"step": NaN, "steps": 4, "data": ""}', None])
def test_the_newest_state_torn_or_gone(copy: Path, content: str | None) -> None:
    newest = copy / "checkpoints/step-00000003"
    newest.mkdir()
    if content is not None:
        (newest / "state.json").write_text(content)
    state = status.look(copy)["state"]
    assert "resumes from step 2 of 4" in state and "the newest checkpoint, step-00000003, cannot be used: " in state
    shutil.rmtree(copy / "checkpoints/step-00000002")
    assert "none of the 1 checkpoints can be used; the newest checkpoint, step-00000003" in status.look(copy)["state"]


def test_no_checkpoint_is_left(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    found = status.look(copy)
    assert found["state"] == "not running, nothing saved; the same command starts from the beginning"
    assert found["saved"] == "nothing: latest names step-00000002, which does not exist"


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (b'{"step": 9, "epo', {"step": "4, 0.01 epochs, "}),
        (b"\xff\xfe\x00", {"step": "4, 0.01 epochs, "}),
        (b"[1, 2]", {"step": "4, 0.01 epochs, "}),
        (b'{"step": 9}', {"step": "9, ", "losses": "not finite"}),
        (b'{"step": 9, "epoch": null, "loss": "x", "images_per_s": NaN, "data_wait": {}}', {"losses": "not finite"}),
        (b'{"step": 9, "loss": 0.5, "images_per_s": 10, "data_wait": null}', {"losses": "loss 0.5", "speed": "10 im"}),
    ],
)
def test_a_last_line_that_is_torn_or_foreign(copy: Path, last: bytes, told: dict[str, str]) -> None:
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(last)
    found = status.look(copy)
    assert all(found[heading].startswith(start) for heading, start in told.items()), found


@pytest.mark.parametrize("name", ["lock", "latest", "metrics.jsonl", "epochs.jsonl", "bad_samples.jsonl"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "absent"])
def test_a_file_that_is_something_else(copy: Path, name: str, kind: str) -> None:
    """Do not wait for a FIFO, and do not read a device."""
    (copy / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(copy / name)
    elif kind == "folder":
        (copy / name).mkdir()
    elif kind == "device":
        (copy / name).symlink_to("/dev/zero")
    assert "resumes from step 2 of 4" in status.look(copy)["state"]


def test_a_long_list_of_unreadable_images_is_counted_in_part(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_BLOCK", 8)
    monkeypatch.setattr(status, "_COUNTED", 32)
    for content, told in ((b"bad\n" * 8, "8, listed"), (b"bad\n" * 9, "more than 8, listed"), (b"", "0, listed")):
        (copy / "bad_samples.jsonl").write_bytes(content)
        assert status.look(copy)["unreadable"].startswith(told)
    monkeypatch.undo()
    with (copy / "bad_samples.jsonl").open("wb") as file:
        file.truncate(10**13)  # one line without an end
    assert status.look(copy)["unreadable"].startswith("more than 0, listed")


def test_a_lock_that_names_nobody(copy: Path) -> None:
    for content in (b"\xff", b"[]", b'{"host": 5, "boot": [], "pid": "x", "token": null}', b"[" * 2000):
        (copy / "lock").write_bytes(content)
        assert "not running" in status.look(copy)["state"]


def test_a_directory_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        status.look(tmp_path)
