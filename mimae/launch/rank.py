"""A rank: the process that the launcher starts with `python -m mimae.launch.rank`.

It leaves a note of how it ended. When its launcher has died, it saves and exits as on a signal.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from mimae.errors import EXIT_MISTAKE, UserError
from mimae.launch import notes
from mimae.outside.text import say

ATTEMPT = "MIMAE_ATTEMPT"
"""Name of the environment variable that counts the starts of a rank, from 0."""

_PATIENCE = 2.0
"""Seconds between two checks that the launcher is alive."""


def main() -> None:
    """Run a recipe as the rank that the environment names.

    The command-line arguments are the folder of the notes, the process id of the launcher, the recipe, and overrides.
    """
    folder, launcher, recipe, *overrides = sys.argv[1:]
    sys.exit(_run(Path(folder), int(launcher), recipe, overrides))


def _run(folder: Path, launcher: int, recipe: str, overrides: list[str]) -> int:
    rank, attempt = int(os.environ["RANK"]), int(os.environ[ATTEMPT])
    # This holds until the run handles the signals itself. Ctrl-C reaches the whole process group, and the launcher
    # forwards it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2)
    threading.Thread(target=_save_when_alone, args=(launcher,), daemon=True).start()
    if notes.is_asked_to_stop(folder):
        return 0
    if rank == 0 and attempt:
        say(f"start {attempt + 1}, after a rank was lost{_last_words(folder, attempt - 1)}")
    try:
        import mimae

        outcome = mimae.run(recipe, *overrides)
    except UserError as mistake:
        notes.leave(folder, "mistake", rank, attempt, str(mistake))
        return EXIT_MISTAKE
    except BaseException as error:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        notes.leave(folder, "error", rank, attempt, traceback.format_exc(), summary[:120])
        return 1
    notes.leave(folder, "saved" if outcome.saved_on_signal else "done", rank, attempt)
    return 0


def _last_words(folder: Path, attempt: int) -> str:
    """Return a clause with the first error of an attempt, or an empty text."""
    errors = [note for note in notes.read(folder, attempt) if note.kind == "error"]
    return f"; the first error was {errors[0].summary}" if errors else ""


def _save_when_alone(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
