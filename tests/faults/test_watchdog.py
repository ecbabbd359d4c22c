"""Hangs: who ends, what is left of it, and what is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimae.faults import watchdog
from mimae.faults.watchdog import Hangs, Stack, Watchdog, patience, read

HANG = """
import ctypes, sys, time
from pathlib import Path
from mimae import distributed
from mimae.faults import watchdog

def hang():
    ctypes.PyDLL(None).sleep(60)  # in C, with the interpreter's lock

distributed.world_size = lambda: 2
with watchdog.Watchdog(Path(sys.argv[1]), 60, 1) as dog:
    for step in range(4):
        dog.wait_for(f"step {step}")
        time.sleep(0.4)
    print("moved on", flush=True)
    hang()
"""


@pytest.mark.parametrize("place", ["run", "file/run"])
def test_a_hang_ends_the_process_whatever_holds_it(tmp_path: Path, place: str) -> None:
    """The second place cannot be written; steps that end in time, longer than the limit in all, are no hang."""
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path / place], capture_output=True, text=True, timeout=50)
    told = "" if place == "run" else f"{tmp_path / place}/stacks/rank-0.txt cannot be written: Not a directory; "
    assert done.returncode == 1 and done.stdout.startswith(told) and done.stdout.endswith("moved on\n")
    assert len(done.stdout.splitlines()) == (1 if place == "run" else 2)
    file = tmp_path / place / "stacks/rank-0.txt"
    assert file.is_file() == (place == "run")
    text = file.read_text() if place == "run" else done.stderr
    stack = read(text)
    assert stack.limit == "0:00:01" and stack.frames[0].endswith("in hang") and len(stack.frames) == 2
    assert place != "run" or (stack.waited_for == "step 3" and not done.stderr)


def test_a_limit_of_zero_is_none(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0.1, 0) as dog:
        dog.wait_for("step 1")
        time.sleep(0.3)
    assert patience(0, 5) is None and patience(5, 0) is None


def test_a_collective_waits_longer_than_the_watchdog() -> None:
    assert min(patience(1800, 300) or 0, patience(5, 1800) or 0) > 1800


def test_stacks_are_read() -> None:
    text = (
        "step 8".ljust(80) + "\nTimeout (0:05:00)!\nThread 0x00007f01 (most recent call first):\n"
        '  File "loader.py", line 1 in run\n\nThread 0x00007f02 (most recent call first):\n'
        + "".join(f'  File "loop.py", line {line} in train\n' for line in range(9))
    )
    frames = [f'File "loop.py", line {line} in train' for line in range(6)]
    assert read(text) == Stack("step 8", "0:05:00", frames)
    assert read("step 8".ljust(80) + "\n") == Stack("step 8", "", [])


def test_a_hang_is_told_once_and_stopped_ranks_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An earlier start's hang is none, nor are stacks that somebody asked for; processes of others are left alone."""
    monkeypatch.setattr(watchdog, "GRACE", 0.3)
    file = tmp_path / "stacks/rank-0.txt"
    file.parent.mkdir()
    stack = "step 8".ljust(80) + '\n{}Thread 0x01 (most recent call first):\n  File "loop.py", line 1 in train\n'
    file.write_text(stack.format("Timeout (0:01:00)!\n"))
    stopped = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        with Hangs(tmp_path, lambda: {0: 2**22 + 1, 1: stopped.pid, 2: os.getpid()}) as hangs:
            file.write_text(stack.format(""))
            time.sleep(1.6)
            assert stopped.poll() is None and not hangs.ended
            for hung in (tmp_path / "stacks/rank-3.txt", file):  # the first on another machine
                hung.write_text(stack.format("Timeout (0:05:00)!\n"))
            assert stopped.wait(10) == -signal.SIGKILL
    finally:
        stopped.kill()
    told = capfd.readouterr().err
    assert told.count("nothing moved for 0:05:00") == 1 and str(tmp_path / "stacks") in told
    assert 'rank 0, 3 in step 8, the latest call first:\n    File "loop.py", line 1 in train\n' in told
    assert "rank 1 left no stack: stopped (T)" in told
    assert stopped.pid in hangs.ended


def test_a_hang_that_ended_all_ranks_is_told_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stacks").mkdir()
    with Hangs(tmp_path, lambda: {0: 2**22 + 1, 1: 2**22 + 2}) as hangs:
        (tmp_path / "stacks/rank-0.txt").write_text(
            'step 8\nTimeout (0:05:00)!\nThread 0x01 (most recent call first):\n  File "loop.py", line 1 in train\n'
        )
    told = capfd.readouterr().err
    assert "nothing moved for 0:05:00" in told and "rank 1 left no stack: ended when it lost its peers" in told
    assert hangs.ended == {2**22 + 1, 2**22 + 2}
