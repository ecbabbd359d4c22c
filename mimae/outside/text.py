"""Output for users: control characters are escaped, and a stream that cannot be written does not end the run."""

from __future__ import annotations

import atexit
import io
import os
import re
import sys
from contextlib import suppress
from typing import Literal, NamedTuple, TextIO, cast

_LINE_ENDS = "\t\n"
# C0 and C1 controls, DEL, marks that change the writing direction, line separators, lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Stream = Literal["stdout", "stderr"]


class Loss(NamedTuple):
    """Number of failed writes to a stream, and the first reason."""

    writes: int
    reason: str


_losses: dict[Stream, Loss] = {}


def printable(text: object, *, lines: bool = False) -> str:
    """Return text that comes from a file (a name, a key, a reason) with its control characters escaped.

    A terminal executes control characters, so such text could hide or forge lines. `lines` keeps tabs and line ends.
    """

    def escape(match: re.Match[str]) -> str:
        found = match[0]
        return found if lines and found in _LINE_ENDS else found.encode("unicode_escape").decode()

    return _CONTROLS.sub(escape, str(text))


def shortened(line: str, most: int = 2000) -> str:
    """Return a line of at most about `most` characters: its beginning and its end, and how much was left out."""
    if len(line) <= most:
        return line
    return f"{line[: most // 2]} [... {len(line) - most:,} characters ...] {line[len(line) - most // 2 :]}"


def say(text: object, *, error: bool = False) -> None:
    """Print lines on stdout or stderr, escaped. A stream that cannot be written is noted in `losses`, never raised."""
    name: Stream = "stderr" if error else "stdout"
    write(name, getattr(sys, name), printable(text, lines=True) + "\n")


def losses() -> dict[Stream, Loss]:
    """Return the streams for which a write by `say` or `Output` failed."""
    return dict(_losses)


def is_terminal(name: Stream = "stdout") -> bool:
    """Return whether a stream is a terminal."""
    stream = getattr(sys, name)
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # a closed file
        return False


class Output(io.TextIOBase):
    """The present stdout or stderr as a file for libraries; failed writes are noted, as by `say`.

    Control characters pass.
    """

    def __init__(self, name: Stream = "stdout") -> None:
        self._name: Stream = name
        self._stream = getattr(sys, name)  # rich replaces sys.stdout with a stream that writes here.

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        return int(self._stream.fileno())

    def write(self, text: str) -> int:
        """Write to the stream, if that is possible."""
        write(self._name, self._stream, text)
        return len(text)


def as_file(name: Stream = "stdout") -> TextIO:
    """Return the present stdout or stderr as an `Output`, with the type that libraries ask for."""
    return cast("TextIO", Output(name))


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null if the caller closed them (`>&-`).

    Otherwise the next files that this process opens would get their descriptors, and output of C libraries would go
    into a file of the run.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest free number, which is this one.


def write(name: Stream, stream: TextIO | None, text: str) -> None:
    """Write text to a stream and flush it. A failure is noted under `name` (see `losses`), never raised."""
    if stream is None:  # The descriptor was closed before the start.
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: a closed file
        if not _losses:
            atexit.register(_abandon)
        reason = getattr(error, "strerror", None) or str(error)
        known = _losses.get(name, Loss(0, reason))
        _losses[name] = known._replace(writes=known.writes + 1)


def _abandon() -> None:
    """Drop the buffers of failed streams: Python would exit with code 120 if it cannot flush them."""
    for name in _losses:
        stream = getattr(sys, name)
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                stream.flush()
