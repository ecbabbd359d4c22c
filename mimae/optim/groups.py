"""Groups of parameters: learning rate, weight decay and clipping norm of each parameter, by a rule of the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

MAIN = "main"
"""Name of the set of parameters whose gradient norm a run reports."""


class Group(NamedTuple):
    """Options of the step of a parameter. Parameters of equal groups are stepped together."""

    peak: float
    """Learning rate at factor 1 of the schedule, including every scale of the group."""
    weight_decay: float
    clip: str = MAIN
    """Name of the set of parameters whose common gradient norm is clipped."""
    adapt: bool = False
    """True if LARS adapts the rate to the norm of each weight."""


Rule = Callable[[str, torch.Size], Group]
"""Function of a parameter's name and whole shape that returns its group."""


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Return whether a parameter is the matrix (or the kernel) of a layer: not a bias, a scale, a token, a position."""
    return len(shape) > 1 and not name.endswith(("token", "pos_embed"))
