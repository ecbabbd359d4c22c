"""Groups of parameters: each parameter's learning rate, weight decay and clipping norm, by a rule of the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

MAIN = "main"
"""The set of parameters whose gradient norm a run reports."""


class Group(NamedTuple):
    """Options by which a parameter is stepped. Parameters of equal groups are stepped together."""

    peak: float
    """Learning rate at factor 1 of the schedule, with every scale of the group in it."""
    weight_decay: float
    clip: str = MAIN
    """The set of parameters with which its gradient norm is taken and clipped."""
    adapt: bool = False
    """True if LARS adapts the rate to the norm of each weight."""


Rule = Callable[[str, torch.Size], Group]
"""(name, shape of the whole) of a parameter -> its group."""


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Return whether a parameter is the matrix (or the kernel) of a layer: not a bias, a scale or a token."""
    return len(shape) > 1 and not name.endswith("token")
