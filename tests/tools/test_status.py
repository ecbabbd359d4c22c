"""What `mimae status` tells of a run at each point of its life."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

import mimae
from mimae.errors import UserError
from mimae.faults import lock
from mimae.tools import status


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of four steps, stopped there by the schedule's own limit."""
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
    (run / "latest").write_text("step-00000002\n")
    assert "goes on from step 2 of 4, and repeats the 2 after it" in status.look(run)["state"]
    (run / "bad_samples.jsonl").write_text(json.dumps({"id": 1}) + "\n")
    assert status.look(run)["unreadable"].startswith("1, listed")


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
    with pytest.raises(UserError, match="not the directory of a run"):
        status.look(tmp_path)
