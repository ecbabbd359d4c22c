"""Tests of the lock of a run directory: on this host, and with lock files of other hosts."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mimae
from mimae.checkpoints import checkpoint
from mimae.errors import RunError
from mimae.faults import lock
from mimae.faults.lock import Owner, moves, read
from mimae.train.trainer import Trainer

ELSEWHERE = Owner("node7", "another boot", 4242, "token")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)


def write(run: Path, owner: Owner) -> None:
    """Write to the lock file like another host, whose flock is not visible here."""
    (run / "lock").write_text(json.dumps(owner._asdict()))


@contextmanager
def beating(run: Path) -> Iterator[None]:
    """Keep writing to the lock file like an owner on another host."""
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.2):
            beats += 1
            write(run, ELSEWHERE._replace(beats=beats))

    write(run, ELSEWHERE)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_two_runs_on_one_host_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "moves", None)
    with lock.lock(tmp_path), pytest.raises(RunError, match=f"in use by process {os.getpid()} on "):  # noqa: SIM117
        with lock.lock(tmp_path):
            pass
    assert (tmp_path / "lock").read_text().strip() == "", "a clean end leaves nobody's name"
    with lock.lock(tmp_path):
        pass


def test_an_owner_that_died_on_this_host_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "moves", None)
    write(tmp_path, ELSEWHERE._replace(boot=lock._boot()))
    with lock.lock(tmp_path) as check:
        check()


def test_an_owner_that_lives_on_another_host_is_left_alone(tmp_path: Path) -> None:
    with beating(tmp_path):
        with pytest.raises(RunError, match="in use by process 4242 on node7"), lock.lock(tmp_path):
            pass
        assert read(tmp_path / "lock")._replace(beats=0) == ELSEWHERE


def test_an_owner_that_died_on_another_host_is_followed(tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE._replace(beats=9))
    began = time.monotonic()
    with lock.lock(tmp_path) as check:
        assert time.monotonic() - began >= lock.PATIENCE
        check()
        assert read(tmp_path / "lock").pid == os.getpid()
        assert moves(tmp_path / "lock"), "and this one's counter moves, for the next to see"


def test_who_was_taken_over_neither_saves_nor_takes_back(tmp_path: Path) -> None:
    with lock.lock(tmp_path) as check:
        write(tmp_path, ELSEWHERE)
        with pytest.raises(RunError, match="was taken over by process 4242 on node7"):
            check()
        time.sleep(5 * lock.BEAT)
    assert read(tmp_path / "lock") == ELSEWHERE


def test_a_run_that_was_taken_over_stops_before_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = Trainer.optimize

    def taken_over(self: Any) -> Any:
        if self.step == 2:
            write(tmp_path, ELSEWHERE)
        return optimize(self)

    monkeypatch.setattr(Trainer, "optimize", taken_over)
    settings = {
        "run": {"dir": str(tmp_path)},
        "data": {"workers": 0, "loader": "torch", "val_path": None},
        "schedule": {"batch_size": 8, "max_steps": 6},
        "checkpoint": {"every_steps": 2, "background": False},
        "telemetry": {"tensorboard": False, "images_every_epochs": 0, "probe_every_epochs": 0},
    }
    with pytest.raises(RunError, match="taken over"):
        mimae.pretrain("quickstart", **settings)
    assert checkpoint.names(tmp_path) == ["step-00000002"]


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Workers may outlive a killed run by seconds; its restart must not wait for them."""
    ready, tell = os.pipe()
    with lock.lock(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(tell, b"forked")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 6)
    try:
        with lock.lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
