"""The interface of an implementation of an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

ParamGroup = dict[str, Any]
"""Parameters `params` with the fields of their `groups.Group`."""


class Stepper(ABC):
    """An optimizer with torch's interface, and a step that can be skipped by a decision on the device."""

    kinds: ClassVar[tuple[str, ...]]
    """Names of the state tensors of each parameter; `step` is a scalar, the others have the parameter's shape."""

    optimizer: torch.optim.Optimizer

    @staticmethod
    @abstractmethod
    def obstacle(device: torch.device) -> str | None:
        """Return the reason for which it cannot step parameters on a device, or None if it can. Builds nothing."""

    @abstractmethod
    def step(self, skipped: Tensor) -> None:
        """Take a step with the gradients of the parameters. If `skipped` (a scalar in fp32) is 1, nothing changes."""

    def set_rate(self, group: ParamGroup, rate: float) -> None:
        """Set the learning rate of a group."""
        group["lr"] = rate

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return the `kinds` of each parameter that has been trained."""
        return dict(self.optimizer.state)

    def load(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Load the result of `state`, and keep its tensors."""
        self.optimizer.state.update(state)
