"""What a source is: a fixed order of encoded images, in which a sample's place is its id."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mimae.data.loading.order import Share


class Source(Protocol):
    """A numbered set of encoded images."""

    @property
    def name(self) -> str:
        """What the source was opened by."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,): the class of each sample, where the source knows it."""

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, where they have any."""

    @property
    def shares(self) -> tuple[Share, ...]:
        """What an epoch is drawn from, its sizes adding up to the source's; but in mixtures the source alone."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Printable lines on what was left out, and on what is not as one would expect."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names and labels in their order: two sources with equal ones number alike."""

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """Where sample i lies, for people and for lists of bad samples."""

    def read(self, i: int) -> bytes:
        """The encoded image of sample i. Raises OSError."""
