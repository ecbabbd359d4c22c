"""events.jsonl: what happened to a run, a line each, through all of its starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from mimae.outside.files import Folder
from mimae.outside.text import say

FILE = "events.jsonl"

KINDS = (
    *("start", "resume", "extend", "finish", "signal", "error"),
    *("save", "save failed", "skipped", "fault", "output lost", "moved"),
)
"""Starts, new schedules and ends; saves; steps whose gradient was not finite; checkpoints that were passed over, lost
ranks and the like; a stdout that cannot be written; a run directory that was renamed or deleted."""


class Events:
    """Adds events to a run's file: `time` (UTC), `step`, `kind` and `details`. Several processes may add to one file.

    An event that cannot be written is lost, which is told once: the run is worth more.
    """

    def __init__(self, folder: Folder | None, tell: Callable[[str], None] = say) -> None:
        """`folder`: the run's directory; None: events go nowhere, as on other ranks than the main one."""
        self._folder, self._tell = folder, tell
        self._is_lost = False
        self.step: int | None = None
        """The step of events that name none: the last one that was logged."""

    def add(self, kind: str, *, step: int | None = None, **details: Any) -> None:
        """Add an event of one of KINDS; `details` are values of JSON."""
        assert kind in KINDS, kind
        if self._folder is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "step": self.step if step is None else step, "kind": kind, "details": details}
        try:
            self._folder.append(FILE, json.dumps(line, default=str).encode() + b"\n")
        except OSError as error:
            if not self._is_lost:
                self._is_lost = True  # first: to tell may add an event
                self._tell(f"{FILE} cannot be written: {error.strerror}; the run goes on")


def read(folder: Folder, limit: int = 1 << 26) -> Iterator[dict[str, Any]]:
    """Yield the events of a run, the oldest first: those in the last `limit` bytes. What is no event is left out."""
    try:
        lines = folder.read(FILE, limit, tail=True).splitlines()
    except OSError:
        return
    for line in lines:
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("kind") in KINDS and isinstance(found.get("details"), dict):
                yield found
