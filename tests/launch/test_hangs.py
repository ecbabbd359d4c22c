"""Tests of the launcher's handling of hangs: the report, and the processes that are ended."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from mimae.launch import hangs
from mimae.launch.hangs import Hangs


def test_a_hang_is_told_once_and_stopped_ranks_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A hang of an earlier start and requested stacks do not count. Processes of other users are not ended."""
    monkeypatch.setattr(hangs, "GRACE", 0.3)
    file = tmp_path / "stacks/rank-0.txt"
    file.parent.mkdir()
    stack = "step 8".ljust(80) + '\n{}Thread 0x01 (most recent call first):\n  File "loop.py", line 1 in train\n'
    file.write_text(stack.format("Timeout (0:01:00)!\n"))
    stopped = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        watched = Hangs(tmp_path)
        ranks = {0: 2**22 + 1, 1: stopped.pid, 2: os.getpid()}
        file.write_text(stack.format(""))
        watched.look(ranks)
        assert stopped.poll() is None and not watched.ended
        for hung in (tmp_path / "stacks/rank-3.txt", file):  # The first one is on another machine.
            hung.write_text(stack.format("Timeout (0:05:00)!\n"))
        watched.look(ranks)
        assert stopped.wait(10) == -signal.SIGKILL
        watched.look(ranks)
    finally:
        stopped.kill()
    told = capfd.readouterr().err
    assert told.count("nothing moved for 0:05:00") == 1 and str(tmp_path / "stacks") in told
    assert 'rank 0, 3 in step 8, the latest call first:\n    File "loop.py", line 1 in train\n' in told
    assert "rank 1 left no stack: stopped (T)" in told
    assert stopped.pid in watched.ended


def test_a_hang_that_ended_all_ranks_is_told_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stacks").mkdir()
    watched = Hangs(tmp_path)
    (tmp_path / "stacks/rank-0.txt").write_text(
        'step 8\nTimeout (0:05:00)!\nThread 0x01 (most recent call first):\n  File "loop.py", line 1 in train\n'
    )
    watched.look({0: 2**22 + 1, 1: 2**22 + 2})
    told = capfd.readouterr().err
    assert "nothing moved for 0:05:00" in told and "rank 1 left no stack: ended when it lost its peers" in told
    assert watched.ended == {2**22 + 1, 2**22 + 2}
