"""Tests of hangs: the process ends, and leaves its stacks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimae.faults.watchdog import Stack, Watchdog, patience, read

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
    """The second place is not writable. Steps that each end in time are no hang, even if together they take longer."""
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
