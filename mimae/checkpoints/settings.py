"""Settings of the checkpoints."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mimae.config.section import Resume, Section


class CheckpointSettings(Section):
    """When the run is saved, and what is kept; it is always saved at its end and on SIGTERM."""

    on_resume: ClassVar[Resume] = "free"

    every_steps: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest")
    every_epochs: int | None = Field(
        None, ge=1, description="epochs between checkpoints that are kept for good, beside the newest; null: none"
    )
    best: Literal["knn", "val_rec"] | None = Field(
        None,
        description="keep the best checkpoint by this measure too, saved with each check of "
        "telemetry.probe_every_epochs; null: none",
    )
    background: bool = Field(
        True,
        description="write while training goes on, from a copy in host memory (of weights, moments and average, shared "
        "by the ranks); false: training waits",
    )
