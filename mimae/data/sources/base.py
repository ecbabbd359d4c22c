"""Interface of a source: encoded images in a fixed order. The position of a sample is its id."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mimae.data.loading.order import Share


class Source(Protocol):
    """A numbered set of encoded images."""

    @property
    def name(self) -> str:
        """The data path with which the source was opened."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,): the class of each sample; None if the source has no classes."""

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes; None if they have no names."""

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources that an epoch is drawn from; their sizes sum to this one's. Only mixtures have several."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Printable lines about files that were left out and about unexpected findings."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and labels in order. Sources with equal fingerprints have the same sample ids."""

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """Return the location of sample i, for messages and lists of bad samples."""

    def read(self, i: int) -> bytes:
        """Return the encoded image of sample i. Raises OSError."""
