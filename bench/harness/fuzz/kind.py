"""A kind of input: the function that draws an input, and the function that uses it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mimae.bench.harness.fuzz.case import Case
from mimae.bench.harness.fuzz.forked import MEMORY


class Kind(NamedTuple):
    """A kind of input. `make` draws a case. `use(folder, case)` uses it.

    `use` returns the reason of a refusal, or an empty string, and raises Wrong for a wrong result.
    """

    make: Callable[[random.Random], Case]
    use: Callable[[Path, Case], str]
    prepare: Callable[[], object] = lambda: None
    """Function that is called once in the warm process, to make the data that all children share."""
    memory: int = MEMORY
    """Maximal number of bytes that a child may take."""
