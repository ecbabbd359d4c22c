"""LARS, for linear classifiers on large batches (You et al. 2017, in the form of MAE's code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimae.optim.stepper import ParamGroup, Stepper

TRUST = 0.001
"""Change of an adapted weight at learning rate 1, as a share of its norm."""


class Lars(Stepper):
    """SGD with momentum, on gradients that are scaled by |w| / |g + decay w| in groups with `adapt`.

    It needs whole parameters for their norms.
    """

    kinds = ("step", "momentum")

    def __init__(self, groups: Sequence[ParamGroup], momentum: float) -> None:
        self.momentum = momentum
        self.optimizer = torch.optim.SGD(groups)  # This object keeps groups, gradients and state; it does not step.

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        return None

    @torch.no_grad()
    def step(self, skipped: Tensor) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["momentum"] = torch.zeros_like(parameter)
                update = parameter.grad
                if group["adapt"]:
                    update = update + group["weight_decay"] * parameter
                    norm, update_norm = parameter.norm(), update.norm()
                    both = (norm > 0) & (update_norm > 0)
                    update = update * torch.where(both, TRUST * norm / update_norm, 1.0)
                moved = self.momentum * state["momentum"] + update
                is_left_out = skipped > 0
                state["step"] += 1 - skipped
                state["momentum"].copy_(torch.where(is_left_out, state["momentum"], moved))
                parameter.copy_(torch.where(is_left_out, parameter, parameter - group["lr"] * moved))
