"""Paths that a user writes."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str, folder: Path = Path()) -> Path:
    """Return a path, which is relative to `folder`, with `~` and `~user` replaced by the home folder.

    The `~` of an unknown user stays: such a path does not exist, and whoever opens it reports that. `Path.expanduser`
    raises RuntimeError instead.
    """
    return folder / os.path.expanduser(path)
