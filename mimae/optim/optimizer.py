"""AdamW's parameter groups, the learning rate of each step, and the device-side decision to take a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mimae.optim.adamw import IMPLEMENTATIONS
from mimae.optim.settings import OptimizerSettings, ScheduleSettings
from mimae.randomness import Part

_KINDS = ("step", "exp_avg", "exp_avg_sq")


def total_steps(schedule: ScheduleSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = schedule.epochs * steps_per_epoch
    return steps if schedule.max_steps is None else min(steps, schedule.max_steps)


def schedule_factor(schedule: ScheduleSettings, step: int, steps_per_epoch: int) -> float:
    """The share of the peak learning rate at optimizer step `step` (from 0): linear warm-up, half-cosine to 0."""
    total = total_steps(schedule, steps_per_epoch)
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


class StepResult(NamedTuple):
    """What a step did, on the device: nothing here has been read by the host."""

    grad_norm: Tensor
    """Norm of the gradient before clipping, V apart."""
    skipped: Tensor
    """1.0 where the gradient was not finite and the step was not taken, else 0.0."""


class Optimizer:
    """AdamW in one fused launch, with V in a group of its own (method 3), clipped apart from the rest."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        settings: OptimizerSettings,
        views: int,
        device: torch.device,
        whole_norms: Callable[[Tensor], Tensor] = lambda norms: norms,
    ) -> None:
        """`parts`: what this rank steps of each parameter, by name, with gradients in `.grad`; `views`: images x masks
        of the global batch, which scale the learning rate; `device`: where they lie when they are stepped;
        `whole_norms`: norms of all parts of the stacked norms of this rank's."""
        self.settings, self.whole_norms = settings, whole_norms
        self.names: dict[Tensor, str] = {part.values: name for name, part in parts.items()}
        groups: dict[str, list[Tensor]] = {"decay": [], "no_decay": [], "posterior": []}
        for name, part in parts.items():
            if "objective.posterior." in name:
                groups["posterior"].append(part.values)
            elif len(part.shape) > 1 and not name.endswith("token"):
                groups["decay"].append(part.values)
            else:
                groups["no_decay"].append(part.values)
        peak = settings.learning_rate * views / 256
        posterior_peak = (settings.posterior_learning_rate or settings.learning_rate) * views / 256
        self.peaks = {"decay": peak, "no_decay": peak, "posterior": posterior_peak}
        self.adamw = IMPLEMENTATIONS[settings.impl](
            [
                {"params": p, "name": name, "weight_decay": settings.weight_decay if name == "decay" else 0.0}
                for name, p in groups.items()
                if p
            ],
            settings.betas,
            device,
        )

    def set_rates(self, factor: float) -> None:
        """Learning rates at `factor` of their peaks from now on."""
        for group in self.adamw.optimizer.param_groups:
            self.adamw.set_rate(group, self.peaks[group["name"]] * factor)

    def step(self, factor: float) -> StepResult:
        """One step at `factor` of the peak learning rates; a gradient that is not finite leaves the weights and the
        moments as they are, by a decision that is taken on the device."""
        main: list[Tensor] = []
        posterior: list[Tensor] = []
        self.set_rates(factor)
        for group in self.adamw.optimizer.param_groups:
            (posterior if group["name"] == "posterior" else main).extend(group["params"])
        clipped = [parameters for parameters in (main, posterior) if parameters]
        norms = self.whole_norms(
            torch.stack([torch.nn.utils.get_total_norm([p.grad for p in ps if p.grad is not None]) for ps in clipped])
        )
        if self.settings.clip is not None:
            for parameters, norm in zip(clipped, norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        skipped = (~norms.isfinite()).any().to(torch.float32)
        self.adamw.step(skipped)
        self.adamw.optimizer.zero_grad()
        return StepResult(norms[0], skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        return {
            f"{kind}.{self.names[p]}": value for p, kinds in self.adamw.state().items() for kind, value in kinds.items()
        }

    def empty_state(self) -> dict[str, Tensor]:
        """What `load_state_dict` takes, to be filled: `state_dict` of an optimizer that has stepped, in new memory."""
        return {
            f"{kind}.{name}": torch.zeros((), device=p.device) if kind == "step" else torch.empty_like(p)
            for p, name in self.names.items()
            for kind in _KINDS
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; keeps the tensors. Raises KeyError when a parameter's state is missing."""
        self.adamw.load({p: {kind: tensors[f"{kind}.{name}"] for kind in _KINDS} for p, name in self.names.items()})
