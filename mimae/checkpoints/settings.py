"""Settings of the checkpoints."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mimae.config.section import Resume, Section


class CheckpointSettings(Section):
    """Times at which the run is saved, and the checkpoints that are kept.

    It is always saved at its end and on SIGTERM.
    """

    on_resume: ClassVar[Resume] = "free"

    every_steps: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="number of newest checkpoints that are kept")
    every_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs between checkpoints that are kept for good besides the newest; null: none",
    )
    best: str | None = Field(
        None,
        description="also keep the best checkpoint by this measure, saved at each check of "
        "telemetry.probe_every_epochs: knn or val_rec in pretraining, top1, top5 or val_loss of a classifier; null: "
        "none",
    )
    background: bool = Field(
        True,
        description="write while training continues, from a copy in host memory (of weights, moments and average, "
        "shared by the ranks); false: training waits",
    )
