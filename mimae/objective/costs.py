"""Costs of a term of the objective on a rank, for the planner. This module imports no torch.

FLOPs are not declared here: the planner counts the products that a forward executes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mimae.model.geometry import Geometry

FP32 = 4
"""Bytes of a number in fp32."""

Ops = Literal["fused", "fake", "plain"]
"""Form of the ops: fused, as on a GPU; fused, without ops' temporary memory; plain references, which keep more."""


class MicroBatch(NamedTuple):
    """Sizes of a micro-batch of one rank, on which the costs depend."""

    geometry: Geometry
    width: int
    """D, the encoder's width."""
    images: int
    """Number of images of this rank."""
    ranks: int
    number: int
    """Bytes of a number in the precision of the products."""
    ops: Ops = "fused"

    @property
    def views(self) -> int:
        """S, the views of this rank's images."""
        return self.images * self.geometry.views


class Sent(NamedTuple):
    """Traffic of a collective over all ranks in a forward."""

    kind: Literal["all-gather", "all-reduce"]
    numbers: int
    """Count of fp32 numbers in the whole tensors of all calls."""
    calls: int
    is_beside: bool = False
    """True if it runs while the decoder computes; the step waits for other collectives."""


class Cost(NamedTuple):
    """Memory and traffic of a micro-batch on a rank. Parameters are not included: they are counted elsewhere."""

    kept: float = 0.0
    """Bytes that autograd keeps from the decoder's end until backward."""
    kept_early: float = 0.0
    """Bytes that autograd keeps from before the decoder until backward, without the latents that all terms share."""
    work: float = 0.0
    """Bytes that are needed in addition at the end of forward."""
    sent: tuple[Sent, ...] = ()
    averaged: int = 0
    """Number of columns that are averaged over the ranks, in one call with the loss (`Result.means`)."""
