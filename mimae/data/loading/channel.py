"""Messages of any size between two processes. Either of them may die at any instruction, also inside a message.

A channel belongs to these two processes, and nothing else waits for it: there is no lock that a dead process could
keep, and no other process that could wait for the rest of its message.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

CHECK = 1.0
"""Seconds without a byte after which the other process is looked at. Its death is usually seen at once, as the end of
the stream, but a third process that was forked at a bad moment may hold a copy of its end."""

_SIZE = struct.Struct("<Q")


class Lost(Exception):
    """The other process has ended, or the channel is closed."""


class Channel:
    """One end. One thread may send while another one receives."""

    def __init__(self, end: socket.socket, is_alive: Callable[[], bool] = lambda: True) -> None:
        """`is_alive` returns whether the other process lives."""
        self._end, self._is_alive = end, is_alive
        self.sent = self.received = 0
        """Numbers of whole messages."""
        self.is_interrupted = False
        """True if an exception, as that of a signal's handler, has stopped a message half-way and ended the stream."""
        end.setblocking(False)

    def send(self, message: bytes) -> None:
        """Send a message. Raises Lost."""
        self._wait(select.POLLOUT)
        with self._whole():
            for part in (_SIZE.pack(len(message)), message):
                left = memoryview(part)
                while left:
                    left = left[self._some(self._end.send, left, select.POLLOUT) :]
            self.sent += 1

    def receive(self) -> bytearray:
        """Return the next message. Raises Lost."""
        self._wait(select.POLLIN)
        with self._whole():
            message = self._read(*_SIZE.unpack(self._read(_SIZE.size)))
            self.received += 1
            return message

    def shut(self) -> None:
        """End the stream for both processes. Calls that wait for a byte raise Lost."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the stream and free the descriptor. No thread may use the channel any more."""
        self.shut()
        self._end.close()

    def _read(self, size: int) -> bytearray:
        block = bytearray(size)
        left = memoryview(block)
        while left:
            count = self._some(self._end.recv_into, left, select.POLLIN)
            if count == 0:
                raise Lost("the stream has ended")
            left = left[count:]
        return block

    def _some(self, move: Callable[[memoryview], int], part: memoryview, event: int) -> int:
        """Return how many bytes of `part` were moved."""
        while True:
            try:
                return move(part)
            except BlockingIOError:
                pass
            except OSError as error:
                raise Lost(error.strerror or str(error)) from error
            self._wait(event)

    def _wait(self, event: int) -> None:
        """Wait until bytes can be moved, or the stream has ended.

        Nothing is caught here: the exception of a signal's handler is the caller's, whatever its type.
        """
        if self._end.fileno() < 0:
            raise Lost("the channel is closed")
        poll = select.poll()
        poll.register(self._end, event)
        while not poll.poll(1000 * CHECK):
            if not self._is_alive():
                raise Lost("the process has ended")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Shut the channel if a message stops half-way: the rest would be taken for the next one."""
        try:
            yield
        except BaseException as error:
            self.is_interrupted = self.is_interrupted or not isinstance(error, Lost)
            self.shut()
            raise
