"""The errors that a person can mend, how text from outside is printed, and the exit codes of the launcher.

0: done; 2: a mistake of the user's, reported without a traceback; 75: saved on a signal (the same command goes on);
1: anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_MISTAKE = 2
EXIT_SAVED = 75


class UserError(ValueError):
    """A mistake that a person can mend. The message says what was wrong, the value, what is legal and what to do.

    Its text is printable, whatever the names in it hold; only its line breaks stay.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


class ConfigError(UserError):
    """A recipe that cannot be run, with every reason found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the settings:", *problems]))


class RunError(UserError):
    """The run cannot start, or cannot go on."""


def printable(text: str) -> str:
    """Return `text` with every character escaped that a terminal would obey or could not show.

    These are control characters, line breaks, marks that turn the direction of writing, and the bytes of a file name
    that are no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
