"""A channel carries messages of any size, and its end is noticed wherever the other process stops."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mimae.data.loading import channel
from mimae.data.loading.channel import Channel, Lost


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CHECK", 0.05)


def send_all(end: Channel, messages: list[bytes]) -> None:
    for message in messages:
        end.send(message)


def test_messages_arrive_whole_and_in_order_in_both_directions() -> None:
    """Sizes from none to more than what the system keeps between two processes; both ends send at the same time."""
    ends = [Channel(end) for end in socket.socketpair()]
    messages = [random.Random(size).randbytes(size) for size in (0, 1, 8, 4096, 1 << 16, 3_000_000, 5)]
    with ThreadPoolExecutor(2) as pool:
        for end in ends:
            pool.submit(send_all, end, messages)
        for end in ends:
            assert [end.receive() for _ in messages] == messages
    assert [(end.sent, end.received) for end in ends] == [(len(messages), len(messages))] * 2


@pytest.mark.parametrize("sent", [b"", b"\x09", struct.pack("<Q", 9), struct.pack("<Q", 9) + b"12345678"])
def test_an_end_inside_a_message_is_noticed(sent: bytes) -> None:
    ours, its = socket.socketpair()
    its.sendall(sent)
    its.close()
    with pytest.raises(Lost):
        Channel(ours).receive()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sent", [b"", struct.pack("<Q", 9) + b"1234"])
def test_a_death_is_noticed_although_a_third_process_has_a_copy_of_the_end(sent: bytes) -> None:
    ours, its = socket.socketpair()
    its.sendall(sent)
    lives = iter([True, False])
    end, copy = Channel(ours, lambda: next(lives)), os.dup(its.fileno())
    its.close()
    with pytest.raises(Lost):
        end.receive()
    os.close(copy)


@pytest.mark.timeout(60)
def test_a_death_is_noticed_by_one_who_sends() -> None:
    """The other process does not read any more, and a copy of its end is open."""
    ours, its = socket.socketpair()
    end, copy = Channel(ours, lambda: False), os.dup(its.fileno())
    its.close()
    with pytest.raises(Lost):
        end.send(bytes(10_000_000))
    os.close(copy)
    with pytest.raises(Lost):
        end.send(b"1")


def test_what_follows_half_a_message_is_not_taken_for_one() -> None:
    """A signal's handler may raise an exception while a message is read."""

    def interrupted() -> bool:
        raise KeyboardInterrupt

    ours, its = socket.socketpair()
    end = Channel(ours, interrupted)
    with pytest.raises(KeyboardInterrupt):
        end.receive()
    assert not end.is_interrupted, "no message had begun"
    its.sendall(struct.pack("<Q", 9) + b"1234")
    with pytest.raises(KeyboardInterrupt):
        end.receive()
    assert end.is_interrupted
    with pytest.raises(OSError):  # The other process is told by the end of the stream.
        its.sendall(b"56789")
    with pytest.raises(Lost):
        end.receive()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [TimeoutError, BlockingIOError, ConnectionError, KeyboardInterrupt])
def test_an_exception_of_a_signals_handler_is_the_callers(kind: type[BaseException]) -> None:
    def handler(number: int, frame: object) -> None:
        raise kind("deadline")

    ours, _its = socket.socketpair()
    end = Channel(ours)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(kind, match="deadline"):
            end.receive()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(60)
def test_a_channel_that_is_shut_ends_a_wait_in_another_thread() -> None:
    end = Channel(socket.socketpair()[0])
    threading.Timer(0.1, end.shut).start()
    began = time.monotonic()
    with pytest.raises(Lost):
        end.receive()
    assert time.monotonic() - began < 10
    end.close()
    with pytest.raises(Lost):
        end.receive()
