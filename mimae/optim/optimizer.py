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
    """Result of a step on the device: the host has read nothing of it."""

    grad_norm: Tensor
    """Norm of the gradient before clipping, of the main set."""
    skipped: Tensor
    """1.0 where the gradient was not finite and the step was not taken, else 0.0."""


class Optimizer:
    """The parameters that a rank steps, in one launch for each group."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        settings: OptimizerSettings,
        rule: Rule,
        device: torch.device,
        whole_norms: Callable[[Tensor], Tensor] = lambda norms: norms,
    ) -> None:
        """`parts`: what this rank steps of each parameter, by name, with gradients in `.grad`; `rule`: the group of
        each; `device`: where they lie when they are stepped; `whole_norms`: norms of all parts of the stacked norms of
        this rank's."""
        self.settings, self.whole_norms = settings, whole_norms
        self.names: dict[Tensor, str] = {part.values: name for name, part in parts.items()}
        found: dict[Group, list[Tensor]] = {}
        for name, part in parts.items():
            found.setdefault(rule(name, part.shape), []).append(part.values)
        # Norms are summed in this order, so it has to stay: the main set first, and in it the matrices.
        ordered = sorted(found.items(), key=lambda item: (item[0].clip != MAIN, not item[0].adapt))
        groups = [{"params": params, **group._asdict()} for group, params in ordered]
        self.stepper: Stepper = (
            Lars(groups, settings.momentum)
            if settings.kind == "lars"
            else IMPLEMENTATIONS[settings.impl](groups, settings.betas, device)
        )

    def set_rates(self, factor: float) -> None:
        """Set learning rates to `factor` of their peaks from now on."""
        for group in self.stepper.optimizer.param_groups:
            self.stepper.set_rate(group, group["peak"] * factor)

    def step(self, factor: float) -> StepResult:
        """Take a step at `factor` of the peak learning rates; a gradient that is not finite leaves the weights and the
        moments as they are, by a decision that is taken on the device."""
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
        """Return what `load_state_dict` takes, to be filled: `state_dict` of an optimizer that has stepped, in new
        memory."""
        return {
            f"{kind}.{name}": torch.zeros((), device=p.device) if kind == "step" else torch.empty_like(p)
            for p, name in self.names.items()
            for kind in self.stepper.kinds
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; keeps the tensors. Raises KeyError when a parameter's state is missing."""
        self.stepper.load(
            {p: {kind: tensors[f"{kind}.{name}"] for kind in self.stepper.kinds} for p, name in self.names.items()}
        )
