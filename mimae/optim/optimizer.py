"""The optimizer: parameters in the groups of a rule, clipping, and the decision on the device to take a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mimae.optim.adamw import IMPLEMENTATIONS
from mimae.optim.groups import MAIN, Group, Rule
from mimae.optim.lars import Lars
from mimae.optim.settings import OptimizerSettings
from mimae.optim.stepper import Stepper
from mimae.randomness import Part


class StepResult(NamedTuple):
    """Result of a step, on the device: the host has not read it."""

    grad_norm: Tensor
    """Gradient norm of the main set before clipping."""
    skipped: Tensor
    """1.0 if the gradient was not finite and the step was skipped, otherwise 0.0."""


class Optimizer:
    """Optimizer of the parameters that a rank steps, with one launch for each group."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        settings: OptimizerSettings,
        rule: Rule,
        device: torch.device,
        whole_norms: Callable[[Tensor], Tensor] = lambda norms: norms,
    ) -> None:
        """Sort the parameters into groups.

        `parts` are this rank's parts of the parameters, by name, with gradients in `.grad`. `rule` gives the group of
        each, and `device` is their device when they are stepped. `whole_norms` turns the stacked norms of this rank's
        parts into the norms of all parts.
        """
        self.settings, self.whole_norms = settings, whole_norms
        self.names: dict[Tensor, str] = {part.values: name for name, part in parts.items()}
        found: dict[Group, list[Tensor]] = {}
        for name, part in parts.items():
            found.setdefault(rule(name, part.shape), []).append(part.values)
        # Norms are summed in this order, which must not change: the main set first, and in it the matrices.
        ordered = sorted(found.items(), key=lambda item: (item[0].clip != MAIN, not item[0].adapt))
        groups = [{"params": params, **group._asdict()} for group, params in ordered]
        self.stepper: Stepper = (
            Lars(groups, settings.momentum)
            if settings.kind == "lars"
            else IMPLEMENTATIONS[settings.impl](groups, settings.betas, device)
        )

    def set_rates(self, factor: float) -> None:
        """Set learning rates to `factor` times their peaks."""
        for group in self.stepper.optimizer.param_groups:
            self.stepper.set_rate(group, group["peak"] * factor)

    def step(self, factor: float) -> StepResult:
        """Take a step at `factor` times the peak learning rates.

        If a gradient is not finite, weights and moments stay as they are. This is decided on the device.
        """
        self.set_rates(factor)
        clipped: dict[str, list[Tensor]] = {}
        for group in self.stepper.optimizer.param_groups:
            clipped.setdefault(group["clip"], []).extend(group["params"])
        norms = self.whole_norms(
            torch.stack(
                [torch.nn.utils.get_total_norm([p.grad for p in ps if p.grad is not None]) for ps in clipped.values()]
            )
        )
        if self.settings.clip is not None:
            for parameters, norm in zip(clipped.values(), norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        skipped = (~norms.isfinite()).any().to(torch.float32)
        self.stepper.step(skipped)
        self.stepper.optimizer.zero_grad()
        return StepResult(norms[0], skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state by parameter name, `exp_avg.NAME` for one, of the stepper's `kinds`."""
        return {
            f"{kind}.{self.names[p]}": value
            for p, kinds in self.stepper.state().items()
            for kind, value in kinds.items()
        }

    def empty_state(self) -> dict[str, Tensor]:
        """Return tensors to fill for `load_state_dict`: the `state_dict` of a stepped optimizer, in new memory."""
        return {
            f"{kind}.{name}": torch.zeros((), device=p.device) if kind == "step" else torch.empty_like(p)
            for p, name in self.names.items()
            for kind in self.stepper.kinds
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`, and keep its tensors. Raises KeyError if a parameter's state is missing."""
        self.stepper.load(
            {p: {kind: tensors[f"{kind}.{name}"] for kind in self.stepper.kinds} for p, name in self.names.items()}
        )
