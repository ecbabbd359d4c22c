"""The interface of an implementation of an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

ParamGroup = dict[str, Any]
"""`params`, and the fields of their `groups.Group`."""


class Stepper(ABC):
    """An optimizer of torch's kind, with a step that can be left out by a decision on the device."""

    kinds: ClassVar[tuple[str, ...]]
    """Tensors of the state of each parameter; `step` is a scalar, the others have the parameter's shape."""

    optimizer: torch.optim.Optimizer

    @staticmethod
    @abstractmethod
    def obstacle(device: torch.device) -> str | None:
        """Return why it cannot step parameters on a device, in words; None where it can. Builds nothing."""

    @abstractmethod
    def step(self, skipped: Tensor) -> None:
        """Take a step with the gradients of the parameters; where `skipped` (a scalar in fp32) is 1 nothing changes."""

    def set_rate(self, group: ParamGroup, rate: float) -> None:
        """Set the learning rate of a group from now on."""
        group["lr"] = rate

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return the `kinds` of each parameter that has been trained."""
        return dict(self.optimizer.state)

    def load(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Take over what `state` gave; keeps the tensors."""
        self.optimizer.state.update(state)
