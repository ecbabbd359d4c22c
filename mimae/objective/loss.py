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
    """(B, N, D)."""
    u: Tensor
    """(B, N, D), the unit vectors along z."""
    moments: Tensor
    """(2, D), mean and sum of squared deviations of z over this rank's latents."""


class Inputs(NamedTuple):
    """All that a term may read when the decoder is done."""

    predictions: Tensor
    """(B, N, M, 3P^2)."""
    images: Tensor
    """(B, H, W, 3) uint8."""
    targets: Tensor
    """(B, N, M) patch ids."""
    mean: Tensor
    """(3,), of the data set's channels, as the next."""
    std: Tensor
    latents: Latents


class Result(NamedTuple):
    """Output of a term: its share of the loss, and its columns of the records."""

    summands: list[Tensor]
    """Local scalars with their graph, weight and gate included, to be added up in this order."""
    means: dict[str, Tensor]
    """Columns, detached local scalars that still have to be averaged over the ranks."""
    columns: dict[str, Tensor]
    """Columns, detached scalars that are equal on all ranks."""


class Loss(ABC):
    """A term of the objective. It holds no weights: its networks are attributes of the objective, `own`."""

    def __init__(self, term: Term, settings: ObjectiveSettings) -> None:
        self.term, self.settings = term, settings

    def networks(self, width: int, grid: Grid) -> dict[str, nn.Module | nn.Parameter]:
        """Return the networks and parameters that only this term needs, by name, for latents of D = `width`."""
        return {}

    def initial_values(self) -> dict[str, float]:
        """Return the initial values of the parameters among `networks` (see `randomness.initialise`)."""
        return {}

    def start(self, latents: Latents, own: Any) -> Any:
        """Begin before the decoder runs, so that collectives run beside it; what is returned comes back as `begun`."""
        return None

    @abstractmethod
    def compute(self, inputs: Inputs, begun: Any, own: Any, factor: Tensor | float) -> Result:
        """Compute the term. `factor` is its weight times the gate's."""

    @abstractmethod
    def cost(self, batch: MicroBatch) -> Cost:
        """Return what the term costs a rank in a micro-batch."""


def losses(settings: ObjectiveSettings) -> list[Loss]:
    """Return the terms that a run computes, in the order of TERMS."""
    return [pkgutil.resolve_name(term.loss)(term, settings) for term in active(settings)]
