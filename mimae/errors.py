"""The error of everything that a person can mend, and the exit codes of the launcher.

0 done; 2 a mistake of the user's, told without a traceback; 75 saved on a signal (the same command goes on);
1 anything else.
"""

EXIT_MISTAKE = 2
EXIT_SAVED = 75


class UserError(ValueError):
    """Says what was wrong, the value, what is legal and what to do."""


class RunError(UserError):
    """The run cannot start, or cannot go on."""
