"""The optimizer: parameters in the groups of a rule, clipping, and the decision on the device to take a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mimae.config.section import Section
from mimae.optim.adamw import IMPLEMENTATIONS
from mimae.optim.groups import MAIN, Group, Rule
from mimae.optim.lars import Lars
from mimae.optim.stepper import Stepper
from mimae.randomness import Part

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Section):
    """AdamW (method 5), or LARS. Learning rates are per 256 of what scale_by counts, by default of views = images x
    masks of the global batch."""

    kind: Literal["adamw", "lars"] = Field(
        "adamw", description="lars: for linear classifiers on large batches, with engine.kind=ddp only"
    )
    impl: Literal["auto", "torch", "apex", "deepspeed"] = Field(
        "auto", description="whose AdamW; auto: torch's fused one; deepspeed: on a GPU with zero1, zero2, zero3 only"
    )
    scale_by: Literal["views", "images", "none"] = Field(
        "views", description="what learning rates are per 256 of, in the global batch; none: they are taken as they are"
    )
    learning_rate: float = Field(1.5e-4, gt=0, description="peak learning rate, per 256 views (see scale_by)")
    posterior_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of V, per 256 views (see scale_by); null: as learning_rate"
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay, on matrices only, none on V")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates, each in [0, 1)")
    momentum: float = Field(0.9, ge=0, lt=1, description="decay rate of LARS's gradients")
    clip: float | None = Field(
        None, gt=0, description="largest gradient norm; V and the rest are clipped apart; null: no clipping"
    )

    def peak(self, rate: float, images: int, views: int) -> float:
        """Return the learning rate that `rate` stands for with a global batch of `images`, of so many `views` each."""
        counted = {"views": images * views, "images": images}
        return rate if self.scale_by == "none" else rate * counted[self.scale_by] / 256


class ScheduleSettings(Section):
    """How long, and how much at a time."""

    epochs: int = Field(400, ge=1, description="passes over the data")
    warmup_epochs: float = Field(10, ge=0, description="epochs of linear warm-up, then as shape says")
    shape: Literal["cosine", "linear", "steps", "constant"] = Field(
        "cosine",
        description="the learning rate after warm-up; cosine, linear: down to floor; steps: times drop_factor at each "
        "of drop_epochs",
    )
    floor: float = Field(
        0.0, ge=0, description="cosine, linear: learning rate at the end, where the peak is learning_rate, scaled"
    )
    drop_epochs: tuple[float, ...] = Field((), description="steps: epochs at which the learning rate drops")
    drop_factor: float = Field(0.1, gt=0, lt=1, description="steps: what is left of the learning rate after a drop")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps of the run, if fewer than epochs give")
    batch_size: int = Field(1024, ge=1, description="images per optimizer step, over all ranks")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step; MI terms see one of them")

    @model_validator(mode="after")
    def _of_this_shape(self) -> ScheduleSettings:
        if self.floor and self.shape not in ("cosine", "linear"):
            raise ValueError(f"floor is a setting of shape=cosine and shape=linear, not of shape={self.shape}")
        if bool(self.drop_epochs) != (self.shape == "steps"):
            raise ValueError(f"drop_epochs and shape=steps need each other; here shape={self.shape}")
        return self


class EMASettings(Section):
    """A moving average of the weights."""

    decay: float | None = Field(None, gt=0, lt=1, description="decay per step; null: no average is kept")


class StepResult(NamedTuple):
    """What a step did, on the device: nothing here has been read by the host."""

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
