"""Output of a command: for people, for scripts (`--quiet`) or for machines (`--json`).

With --json, stdout holds what `as_json` writes and nothing else: all other output of the process and of its children
goes to stderr. With --quiet, `Progress` and the lines of a run are left out; results and errors stay.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, TextIO

from mimae.outside.text import write

QUIET = "MIMAE_QUIET"
"""Name of the environment variable that is 1 with --quiet: ranks and worker processes inherit it."""

_machine: TextIO | None = None


def is_quiet() -> bool:
    """Return whether progress is left out."""
    return os.environ.get(QUIET) == "1"


def wants_json() -> bool:
    """Return whether the command was called with --json."""
    return _machine is not None


def as_json(document: Any) -> bool:
    """Write a document on stdout, if the command was called with --json; return whether it was.

    The document is written on one line. Numbers that are not finite become null; paths and other objects become text.
    """
    if _machine is None:
        return False
    write("stdout", _machine, json.dumps(_plain(document), allow_nan=False) + "\n")
    return True


@contextmanager
def mode(*, quiet: bool, machine: bool) -> Iterator[None]:
    """Choose the kind of output of a command while the context is open."""
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(_quiet())
        if machine:
            stack.enter_context(_for_machines())
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before


@contextmanager
def _for_machines() -> Iterator[None]:
    """Keep stdout for documents, and send all other output to stderr: that of C libraries and child processes too."""
    global _machine
    before, stdout = _machine, sys.stdout
    with ExitStack() as stack:
        if _is_descriptor(stdout, 1):
            stdout.flush()
            kept = os.dup(1)
            _machine = stack.enter_context(os.fdopen(kept, "w", encoding="utf-8", closefd=False))
            os.dup2(2, 1)
        else:
            _machine = stdout  # A test replaced it.
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            if _machine is not stdout:
                stdout.flush()
                os.dup2(kept, 1)
                os.close(kept)
            _machine = before


def _is_descriptor(stream: TextIO | None, number: int) -> bool:
    try:
        return stream is not None and stream.fileno() == number
    except (OSError, ValueError):  # It has none, or is closed.
        return False


def _plain(value: Any) -> Any:
    """Return a value of the types that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return str(value)
