"""The terms of the objective. Records, settings' checks, planner and status go over this list; it needs no torch.

To add a term, write its module (a `Loss`, see `objective.loss`), add its weight to the settings, and describe it in
TERMS. docs/method.md describes the terms that are there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mimae.objective.settings import ObjectiveSettings


class Term(NamedTuple):
    """Declaration of a term, for everyone except the objective itself."""

    name: str
    """The column of its loss in the records."""
    loss: str
    """The class that computes it, as module:class."""
    weight: str | None
    """Its weight's key in the section `objective`; None: it is always computed, with weight 1."""
    compares: tuple[Literal["views", "images"], ...] = ()
    """Items that it compares and needs at least two of: views of an image, or images of a micro-batch."""
    reads_latents: bool = False
    """True if it has a gradient through the latents of the views."""
    is_gated: bool = False
    """True if its weight is 0 until the gate opens."""
    losses: tuple[str, ...] = ()
    """Further losses, columns of metrics.jsonl and epochs.jsonl."""
    estimates: tuple[str, ...] = ()
    """Columns of epochs.jsonl that give the loss in other units."""
    diagnostics: tuple[str, ...] = ()
    """Signs of health, columns of epochs.jsonl."""
    group: str | None = None
    """The network of this term that has an optimizer group and a clipping norm of its own."""


TERMS = (
    Term("rec", "mimae.objective.reconstruction:Reconstruction", weight=None),
    Term(
        "max_mi",
        "mimae.objective.infonce:MaxMI",
        weight="max_mi",
        compares=("views", "images"),
        reads_latents=True,
        is_gated=True,
        estimates=("mi_lower_nats",),
    ),
    Term(
        "min_mi",
        "mimae.objective.club:MinMI",
        weight="min_mi",
        compares=("images",),
        reads_latents=True,
        is_gated=True,
        losses=("fit",),
        estimates=("mi_upper_nats",),
        diagnostics=("saturated",),
        group="posterior",
    ),
)
"""All terms, in the order in which they are added up."""

LOSSES = ("loss", *(column for term in TERMS for column in (term.name, *term.losses)))
ESTIMATES = tuple(column for term in TERMS for column in term.estimates)
DIAGNOSTICS = tuple(column for term in TERMS for column in term.diagnostics)


def active(settings: ObjectiveSettings) -> list[Term]:
    """Return the terms that a run computes: a term of weight 0 costs nothing."""
    return [term for term in TERMS if term.weight is None or getattr(settings, term.weight) > 0]
