"""The computation of a term of the objective: the protocol between `Objective` and the modules that `TERMS` names.

Letters in shapes: B images of this rank, N views, K visible, M targets, D width, P patch size.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from mimae.model.geometry import Grid
from mimae.objective.costs import Cost, MicroBatch
from mimae.objective.settings import ObjectiveSettings
from mimae.objective.terms import Term, active


class Latents(NamedTuple):
    """The latents of this rank's views, fp32."""

    z: Tensor
    """Latents (B, N, D)."""
    u: Tensor
    """Unit vectors along z, (B, N, D)."""
    moments: Tensor
    """Mean and sum of squared deviations of z over this rank's latents, (2, D)."""


class Inputs(NamedTuple):
    """Inputs of the terms after the decoder has run."""

    predictions: Tensor
    """Predicted patches, (B, N, M, 3P^2)."""
    images: Tensor
    """Images, uint8 (B, H, W, 3)."""
    targets: Tensor
    """Patch ids of the targets, (B, N, M)."""
    mean: Tensor
    """Mean of the data set's channels, (3,); `std` is their standard deviation."""
    std: Tensor
    latents: Latents


class Result(NamedTuple):
    """Output of a term: its part of the loss, and its columns of the records."""

    summands: list[Tensor]
    """Local scalars with their graph, weight and gate included. They are summed in this order."""
    means: dict[str, Tensor]
    """Columns that are detached local scalars; they still have to be averaged over the ranks."""
    columns: dict[str, Tensor]
    """Columns that are detached scalars, equal on all ranks."""


class Loss(ABC):
    """A term of the objective. It has no weights itself: its networks (`own`) are attributes of the objective."""

    def __init__(self, term: Term, settings: ObjectiveSettings) -> None:
        self.term, self.settings = term, settings

    def networks(self, width: int, grid: Grid) -> dict[str, nn.Module | nn.Parameter]:
        """Return the networks and parameters that only this term needs, by name, for latents of D = `width`."""
        return {}

    def initial_values(self) -> dict[str, float]:
        """Return the initial values of the parameters among `networks` (see `randomness.initialise`)."""
        return {}

    def start(self, latents: Latents, own: Any) -> Any:
        """Begin before the decoder, so that collectives overlap with it. `compute` gets the result as `begun`."""
        return None

    @abstractmethod
    def compute(self, inputs: Inputs, begun: Any, own: Any, factor: Tensor | float) -> Result:
        """Compute the term. `factor` is its weight times the gate's."""

    @abstractmethod
    def cost(self, batch: MicroBatch) -> Cost:
        """Return the cost of the term for a rank in a micro-batch."""


def losses(settings: ObjectiveSettings) -> list[Loss]:
    """Return the terms that a run computes, in the order of TERMS."""
    return [pkgutil.resolve_name(term.loss)(term, settings) for term in active(settings)]
