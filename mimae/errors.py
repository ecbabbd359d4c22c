"""The error of everything that a person can mend: the launcher prints its text alone and exits with 2."""


class UserError(ValueError):
    """Says what was wrong, the value, what is legal and what to do."""
