"""Tests that a run which waits for something that never comes ends on a signal."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from mimae.errors import RunError
from mimae.faults import signals as module
from mimae.faults.signals import Signals


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_AFTER_SIGNAL", 0.2)


def test_a_signal_ends_a_wait() -> None:
    """The signal comes before or during the wait, for example for a worker whose storage does not answer."""
    for before in (True, False):
        with Signals() as signals:
            if before:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            told = pytest.raises(RunError, match="asked to stop, and the next batch did not come")
            with told, signals.waiting_for("the next batch"):
                time.sleep(30)


def test_a_batch_that_comes_in_time_is_taken() -> None:
    old = signal.getsignal(signal.SIGALRM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with signals.waiting_for("the next batch"):
            time.sleep(0.01)
        time.sleep(0.4)  # Saving takes some time.
        assert signals.received
    assert signal.getsignal(signal.SIGALRM) == old


def test_nothing_ends_a_wait_that_was_not_told_to() -> None:
    with Signals() as signals, signals.waiting_for("the next batch"):
        time.sleep(0.5)
    assert not signals.received
