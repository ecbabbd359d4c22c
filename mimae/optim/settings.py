"""Settings of the optimizer, the schedule and the average of weights."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mimae.config.section import Section, setting

Decay = Annotated[float, Field(ge=0, lt=1)]

Side = Annotated[int, Field(ge=1, le=16384)]

Share = Annotated[float, Field(gt=0, le=1)]


class OptimizerSettings(Section):
    """AdamW (method 5), or LARS. Learning rates are per 256 items of the global batch; scale_by names the items, which
    are views = images x masks by default."""

    kind: Literal["adamw", "lars"] = Field(
        "adamw", description="lars: for linear classifiers on large batches, with engine.kind=ddp only"
    )
    impl: Literal["auto", "torch", "apex", "deepspeed"] = setting(
        "auto",
        resume="rounding",
        description="kind of AdamW; auto: torch's fused one; deepspeed: on a GPU with zero1, zero2, zero3 only",
    )
    scale_by: Literal["views", "images", "none"] = Field(
        "views",
        description="items of the global batch, per 256 of which rates are given; none: rates are not scaled",
    )
    learning_rate: float = Field(1.5e-4, gt=0, description="peak learning rate, per 256 views (see scale_by)")
    posterior_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of V, per 256 views (see scale_by); null: learning_rate"
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay, on matrices only, none on V")
    decay_tokens: bool = Field(False, description="weight decay on class and mask token too, as in MAE's code")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates, each in [0, 1)")
    momentum: float = Field(0.9, ge=0, lt=1, description="decay rate of LARS's gradients")
    clip: float | None = Field(
        None,
        gt=0,
        description="largest gradient norm; V and the rest are clipped separately; null: no clipping",
    )

    def peak(self, rate: float, images: int, views: int) -> float:
        """Return the scaled value of `rate` for a global batch of `images` images with `views` views each."""
        counted = {"views": images * views, "images": images}
        return rate if self.scale_by == "none" else rate * counted[self.scale_by] / 256


class ScheduleSettings(Section):
    """Length of the run, batch size and learning-rate schedule."""

    epochs: int = Field(400, ge=1, description="passes over the data")
    warmup_epochs: float = Field(10, ge=0, description="epochs of linear warm-up; shape applies afterwards")
    warmup_from_zero: bool = Field(
        False,
        description="the first step has rate 0, as in MAE's code, and a warm-up need not be whole steps; false: step s "
        "of a warm-up of w steps, from 1 on, has s/w of the peak",
    )
    shape: Literal["cosine", "linear", "steps", "constant"] = Field(
        "cosine",
        description="the learning rate after warm-up; cosine, linear: down to floor; steps: times drop_factor at each "
        "of drop_epochs",
    )
    floor: float = Field(
        0.0, ge=0, description="cosine, linear: learning rate at the end, where the peak is learning_rate, scaled"
    )
    drop_epochs: tuple[float, ...] = Field((), description="steps: epochs at which the learning rate drops")
    drop_factor: float = Field(0.1, gt=0, lt=1, description="steps: factor of the learning rate at a drop")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps of the run, if fewer than its epochs have")
    resolution: tuple[tuple[Side | tuple[Side, Side], Share], ...] = Field(
        (),
        examples=[[[16, 0.3], [24, 0.3], [32, 0.4]]],
        description="pretraining on images that grow: for each stage of the run the size of its images, as in "
        "data.image_size, and its share of the steps; the last size is data.image_size; []: one size",
    )
    extended: tuple[tuple[int, float, str], ...] = setting(
        (),
        resume="free",
        description="written by `mimae extend`: for each extension, the step at which the schedule above begins, the "
        "share of the peak learning rate there, and the earlier settings",
    )
    batch_size: int = Field(1024, ge=1, description="images per optimizer step, over all ranks")
    accumulate: int = Field(
        1,
        ge=1,
        description="micro-batches per optimizer step; MI terms see one of them, and pretraining without such "
        "terms may change it when it is resumed",
    )

    @model_validator(mode="after")
    def _of_this_shape(self) -> ScheduleSettings:
        if self.floor and self.shape not in ("cosine", "linear"):
            raise ValueError(f"floor applies to shape=cosine and shape=linear, not to shape={self.shape}")
        if bool(self.drop_epochs) != (self.shape == "steps"):
            raise ValueError(f"drop_epochs and shape=steps go together, and shape={self.shape}")
        return self

    @field_validator("resolution")
    @classmethod
    def _is_a_whole_run(cls, stages: tuple[tuple[Any, float], ...]) -> tuple[tuple[Any, float], ...]:
        if stages and not math.isclose(total := math.fsum(share for _, share in stages), 1, abs_tol=1e-6):
            raise ValueError(f"the shares of the stages sum to {total:g}; legal is 1")
        return stages


class EMASettings(Section):
    """A moving average of the weights."""

    decay: float | None = Field(None, gt=0, lt=1, description="decay per step; null: no average is kept")
