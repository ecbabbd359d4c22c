"""Settings of the telemetry."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mimae.config.section import Resume, Section


class TelemetrySettings(Section):
    """Frequency and destinations of a run's reports."""

    on_resume: ClassVar[Resume] = "free"

    log_every_steps: int = Field(20, ge=1, description="optimizer steps between two lines of metrics.jsonl")
    images_every_epochs: int = Field(1, ge=0, description="epochs between two reconstruction pictures; 0: none")
    probe_every_epochs: int = Field(
        0, ge=0, description="epochs between two kNN and reconstruction checks on data.val_path; 0: none"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="trackers of curves in addition to metrics.jsonl: event files in the run's tensorboard/, Weights & "
        "Biases, MLflow; the last two take their server from their own environment variables",
    )
