"""The classes of a classifier: how they are numbered, and the labels of other sources in that numbering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimae.data.sources.base import Source
from mimae.data.sources.subset import Subset
from mimae.errors import UserError


@dataclass(frozen=True)
class Classes:
    """The classes of a training set, in the order of the classifier's outputs."""

    names: list[str] | None
    """Their names; None where the training set has numbers alone."""
    numbers: list[int]
    """Their numbers in the training set, ascending."""

    @classmethod
    def of(cls, source: Source) -> Classes:
        """Return the classes of a training set; of the whole of it, where a part is trained on. Raises UserError where
        it has none, or one."""
        whole = source.whole if isinstance(source, Subset) else source
        if whole.labels is None:
            raise UserError(
                f"{whole.name} has no labels, which a classifier needs: put each class into a folder of its own, or "
                "name a list file with a class on each line"
            )
        names = whole.classes
        numbers = list(range(len(names))) if names is not None else np.unique(whole.labels).tolist()
        if len(numbers) < 2:
            raise UserError(f"{whole.name} has images of {len(numbers)} class; a classifier needs at least 2")
        return cls(names, numbers)

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Classes:
        """Return what `state` gave."""
        return cls(state["names"], state["numbers"])

    def state(self) -> dict[str, Any]:
        """Return the classes as JSON has them."""
        return {"names": self.names, "numbers": self.numbers}

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, place: int) -> str:
        """Return the name, or the number, of an output."""
        return str(self.numbers[place]) if self.names is None else self.names[place]

    def places(self, source: Source) -> Tensor:
        """Return the output that each sample of a source belongs to, int64 (n,): by the class's name where both have
        names, else by its number. Raises UserError for classes that the classifier does not have."""
        if source.labels is None:
            raise UserError(f"{source.name} has no labels, which an evaluation needs; mimae predict needs none")
        present, inverse = np.unique(source.labels, return_inverse=True)
        if self.names is not None and source.classes is not None:
            known: dict[Any, int] = {name: place for place, name in enumerate(self.names)}
            keys: list[Any] = [source.classes[number] for number in present]
        else:
            known = {number: place for place, number in enumerate(self.numbers)}
            keys = present.tolist()
        if strange := [key for key in keys if key not in known]:
            raise UserError(
                f"{source.name} has images of {len(strange)} classes that the classifier does not have, {strange[0]} "
                f"among them; legal are its {len(self)}: {_listed(list(known))}"
            )
        return torch.from_numpy(np.array([known[key] for key in keys], np.int64)[inverse])

    def missing(self, places: Tensor) -> list[str]:
        """Return the names of the classes that none of the samples at `places` is of."""
        counts = torch.bincount(places, minlength=len(self))
        return [self.name(place) for place in (counts == 0).nonzero()[:, 0].tolist()]


def _listed(keys: list[Any]) -> str:
    return f"{', '.join(map(str, keys[:5]))}{', ...' * (len(keys) > 5)}"
