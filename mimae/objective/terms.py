"""The terms of the objective. Records, checks of settings, planner and status use this list; it imports no torch.

To add a term, write its module (a `Loss`, see `objective.loss`), add its weight to the settings, and describe it in
TERMS. docs/method.md describes the existing terms.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mimae.objective.settings import ObjectiveSettings


class Term(NamedTuple):
    """Declaration of a term, for all modules except the objective itself."""

    name: str
    """The column of its loss in the records."""
    loss: str
    """The class that computes it, as module:class."""
    weight: str | None
    """Key of its weight in the section `objective`; None if it is always computed, with weight 1."""
    compares: tuple[Literal["views", "images"], ...] = ()
    """Items that it compares, of which it needs at least two: views of an image, or images of a micro-batch."""
    reads_latents: bool = False
    """True if it has a gradient through the latents of the views."""
    is_gated: bool = False
    """True if its weight is 0 until the gate opens."""
    losses: tuple[str, ...] = ()
    """Further losses, columns of metrics.jsonl and epochs.jsonl."""
    estimates: tuple[str, ...] = ()
    """Columns of epochs.jsonl that give the loss in other units."""
    diagnostics: tuple[str, ...] = ()
    """Diagnostics, columns of epochs.jsonl."""
    group: str | None = None
    """Network of this term with a separate optimizer group and clipping norm."""


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
"""All terms, in the order of summation."""

LOSSES = ("loss", *(column for term in TERMS for column in (term.name, *term.losses)))
ESTIMATES = tuple(column for term in TERMS for column in term.estimates)
DIAGNOSTICS = tuple(column for term in TERMS for column in term.diagnostics)


def active(settings: ObjectiveSettings) -> list[Term]:
    """Return the terms that a run computes. A term of weight 0 is not computed."""
    return [term for term in TERMS if term.weight is None or getattr(settings, term.weight) > 0]
