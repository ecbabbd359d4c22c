"""Settings of a run."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mimae.config.section import PATH, Resume, Section


class RunSettings(Section):
    """The directory of a run, and the times after which it counts as hung."""

    on_resume: ClassVar[Resume] = "free"

    dir: str = Field(
        "runs/unnamed",
        min_length=1,
        json_schema_extra=PATH,
        description="the run's directory; if no recipe or override names one: runs/ and the recipe's name",
    )
    dry: bool = Field(False, description="take one step, evaluate, write a checkpoint, then stop")
    extend: bool = Field(
        False,
        description="apply a changed schedule from the step on that the run has reached; `mimae extend` sets it "
        "(docs/weights.md)",
    )
    first_step_timeout: float = Field(
        1800,
        ge=0,
        description="time limit in seconds of the first step of a start or of an epoch, of checks and of checkpoints; "
        "a run that exceeds it writes the stacks of its ranks and ends, to be started again; 0: no limit",
    )
    step_timeout: float = Field(300, ge=0, description="time limit in seconds of all other steps; 0: no limit")
