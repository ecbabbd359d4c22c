"""A kind of input: how one is drawn, and how it is used."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mimae.bench.harness.fuzz.case import Case
from mimae.bench.harness.fuzz.forked import MEMORY


class Kind(NamedTuple):
    """`make` draws a case; `use(folder, case)` returns why the input was refused, or nothing, and raises Wrong."""

    make: Callable[[random.Random], Case]
    use: Callable[[Path, Case], str]
    prepare: Callable[[], object] = lambda: None
    """Called once in the warm process, for what all children share."""
    memory: int = MEMORY
    """Bytes that a child may take."""
