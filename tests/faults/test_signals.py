"""Tests of signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mimae import distributed
from mimae.faults.signals import WISHES, Signals, handled


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in WISHES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WISHES)
def test_a_wish_is_received_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    seen: list[Any] = []
    signal.signal(number, lambda *_: seen.append("old"))
    with handled(lambda received, _: seen.append(received)):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert seen == [number, "old"]


@pytest.mark.parametrize("number", WISHES)
def test_an_ignored_signal_stays_ignored_but_for_ctrl_c(number: signal.Signals) -> None:
    """`nohup` ignores SIGHUP. Scripts ignore SIGINT for all background jobs, so an explicit SIGINT has to work."""
    seen: list[Any] = []
    signal.signal(number, signal.SIG_IGN)
    with handled(lambda received, _: seen.append(received)):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_IGN
    assert seen == ([number] if number == signal.SIGINT else [])


def test_in_a_thread_the_process_decides() -> None:
    """Only the main thread may set handlers in Python; a run in another thread has none."""
    seen: list[Any] = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("the process's own"))

    def run() -> None:
        distributed.setup()
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not signals.agreed() and not signals.agreed()
        distributed.shutdown()
        seen.append("done")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert sorted(seen) == ["done", "the process's own"]


def test_a_second_ctrl_c_ends_at_once() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup it would be ignored, and would stay so.
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
