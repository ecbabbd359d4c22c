"""Errors that a user can correct, and the exit codes of the launcher.

0: done; 2: a mistake of the user, reported without a traceback; 75: saved on a signal (the same command resumes);
1: any other error.
"""

from __future__ import annotations

from collections.abc import Sequence

from mimae.outside.text import printable, shortened

EXIT_MISTAKE = 2
EXIT_SAVED = 75


class UserError(ValueError):
    """A mistake that a user can correct. The message has the fault, the value, the legal values and what to do.

    Control characters in its text are escaped, except line breaks. Long lines are shortened.
    """

    def __str__(self) -> str:
        return "\n".join(map(shortened, printable(super().__str__(), lines=True).split("\n")))


class ConfigError(UserError):
    """A recipe that cannot be run, with all problems found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the settings:", *problems]))


class RunError(UserError):
    """The run cannot start or continue."""


class CheckpointError(UserError):
    """No checkpoint of the run can be used, or one could not be written."""
