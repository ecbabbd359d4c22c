"""events.jsonl: the events of a run, one line each, over all starts of the run."""

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
    *("save", "save failed", "skipped", "fault", "warning", "output lost", "moved", "resolution"),
)
"""Kinds of events: starts, new schedules and ends; saves; steps whose gradient was not finite; faults such as lost
ranks or checkpoints that were passed over; warnings of what slows a run down or keeps it from learning; a stdout that
cannot be written; a run directory that was renamed or deleted; the first step with images of another size."""


class Events:
    """Writer of events to a run's file: `time` (UTC), `step`, `kind` and `details`. Several processes may share a file.

    An event that cannot be written is lost, and the run continues; the loss is reported once.
    """

    def __init__(self, folder: Folder | None, tell: Callable[[str], None] = say) -> None:
        """Write to `folder`, the run's directory, or drop all events if it is None, as on ranks other than the main."""
        self._folder, self._tell = folder, tell
        self._is_lost = False
        self.step: int | None = None
        """Step of events that are added without one: the last step that was logged."""

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
                self._is_lost = True  # Set this first: the report may add an event.
                self._tell(f"{FILE} cannot be written: {error.strerror}; the run continues")


def read(folder: Folder, limit: int = 1 << 26) -> Iterator[dict[str, Any]]:
    """Yield the events in the last `limit` bytes of a run's file, oldest first.

    Lines that are not events are skipped.
    """
    try:
        lines = folder.read(FILE, limit, tail=True).splitlines()
    except OSError:
        return
    for line in lines:
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("kind") in KINDS and isinstance(found.get("details"), dict):
                yield found
