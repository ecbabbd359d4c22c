"""Settings of the optimizer, the schedule and the average of weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mimae.config.section import Section, setting

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Section):
    """AdamW (method 5). Learning rates are per 256 views, views = images x masks of the global batch."""

    impl: Literal["auto", "torch", "apex", "deepspeed"] = setting(
        "auto",
        resume="rounding",
        description="whose AdamW; auto: torch's fused one; deepspeed: on a GPU with zero1, zero2, zero3 only",
    )
    learning_rate: float = Field(1.5e-4, gt=0, description="peak learning rate per 256 views")
    posterior_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of V per 256 views; null: as learning_rate"
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay, on matrices only, none on V")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates, each in [0, 1)")
    clip: float | None = Field(
        None, gt=0, description="largest gradient norm; V and the rest are clipped apart; null: no clipping"
    )


class ScheduleSettings(Section):
    """How long, and how much at a time."""

    epochs: int = Field(400, ge=1, description="passes over the data")
    warmup_epochs: float = Field(10, ge=0, description="epochs of linear warm-up, then half-cosine to 0")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps of the run, if fewer than epochs give")
    batch_size: int = Field(1024, ge=1, description="images per optimizer step, over all ranks")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step; MI terms see one of them")


class EMASettings(Section):
    """A moving average of the weights."""

    decay: float | None = Field(None, gt=0, lt=1, description="decay per step; null: no average is kept")
