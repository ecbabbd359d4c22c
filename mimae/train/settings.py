"""Settings of a run."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mimae.config.section import PATH, Resume, Section


class RunSettings(Section):
    """Directory of a run, and the times after which it counts as hung."""

    on_resume: ClassVar[Resume] = "free"

    dir: str = Field(
        "runs/unnamed",
        min_length=1,
        json_schema_extra=PATH,
        description="the run's directory; where no recipe or override names one: runs/ and the recipe's name",
    )
    dry: bool = Field(False, description="one step of everything, checkpoint included, then stop")
    extend: bool = Field(
        False,
        description="take a changed schedule as a new one from the step on that the run has reached; `mimae extend` "
        "sets it (docs/weights.md)",
    )
    first_step_timeout: float = Field(
        1800,
        ge=0,
        description="seconds until the first step of a start or of an epoch is done, and for checks and checkpoints; a "
        "run that takes longer ends with its ranks' stacks, to be started again; 0: no limit",
    )
    step_timeout: float = Field(300, ge=0, description="the same for all other steps")
