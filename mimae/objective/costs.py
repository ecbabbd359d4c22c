"""The costs of a term of the objective on a rank, as the planner asks for them. Needs no torch.

FLOPs are not declared: the planner counts the products that a forward executes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mimae.model.geometry import Geometry

FP32 = 4
"""Bytes of a number in fp32."""

Ops = Literal["fused", "fake", "plain"]
"""How the ops run: fused, as on a GPU; fused, without the memory that an op takes and gives back; as plain references,
which keep more."""


class MicroBatch(NamedTuple):
    """Sizes that the costs depend on: a micro-batch of one rank."""

    geometry: Geometry
    width: int
    """D, the encoder's width."""
    images: int
    """Images of this rank."""
    ranks: int
    number: int
    """Bytes of a number in the precision of the products."""
    ops: Ops = "fused"

    @property
    def views(self) -> int:
        """S, the views of this rank's images."""
        return self.images * self.geometry.views


class Sent(NamedTuple):
    """Numbers in fp32 that a collective over all ranks moves in a forward."""

    kind: Literal["all-gather", "all-reduce"]
    numbers: int
    """Bytes of the whole tensors of all calls."""
    calls: int
    is_beside: bool = False
    """True if it runs while the decoder computes; the step waits for other collectives."""


class Cost(NamedTuple):
    """Bytes of a micro-batch on a rank, and what it sends. Parameters are not part of it: they are counted."""

    kept: float = 0.0
    """Bytes that autograd keeps from the decoder's end until backward."""
    kept_early: float = 0.0
    """Bytes that autograd keeps from before the decoder until backward, without the latents that all terms share."""
    work: float = 0.0
    """Bytes that are needed in addition at the end of forward."""
    sent: tuple[Sent, ...] = ()
    averaged: int = 0
    """Columns that are averaged over the ranks, in one call with the loss (`Result.means`)."""
