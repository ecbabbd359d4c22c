"""Notes between the ranks of a machine and their launcher, as files in a private folder of the launcher."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple


class Note(NamedTuple):
    """The way a rank ended: `done`, `saved` (on a signal), `mistake` (of the user) or `error`.

    The last two have a text.
    """

    kind: str
    rank: int
    attempt: int
    time: float
    text: str = ""
    summary: str = ""


def leave(folder: Path, kind: str, rank: int, attempt: int, text: str = "", summary: str = "") -> None:
    """Write the note of a rank atomically."""
    note = Note(kind, rank, attempt, time.time(), text, summary)
    path = folder / f"note-{attempt}-{rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(note._asdict()))
    os.replace(temporary, path)


def read(folder: Path, attempt: int) -> list[Note]:
    """Return the notes of an attempt and the mistakes of all attempts, earliest first."""
    found = [Note(**json.loads(file.read_text())) for file in folder.glob("note-*.json")]
    return sorted(
        (note for note in found if note.attempt == attempt or note.kind == "mistake"), key=lambda note: note.time
    )


def ask_to_stop(folder: Path) -> None:
    """Ask ranks that have not begun yet to stop."""
    (folder / "stop").touch()


def is_asked_to_stop(folder: Path) -> bool:
    """Return whether the ranks were asked to save and stop."""
    return (folder / "stop").exists()
