"""The tree of settings: every room's own class in its section, and how a key names a value in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mimae.checkpoints.settings import CheckpointSettings
from mimae.config.section import Resume, Section, setting
from mimae.data.settings import DataSettings
from mimae.engines.settings import Compile, EngineSettings
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.objective.settings import ObjectiveSettings
from mimae.optim.settings import EMASettings, OptimizerSettings, ScheduleSettings
from mimae.telemetry.settings import TelemetrySettings
from mimae.train.settings import RunSettings


class Recipe(Section):
    """Everything that a pretraining run depends on."""

    seed: int = Field(0, ge=0, lt=2**32, description="key of all random streams: masks, order, crops, weights")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of the matrix products; weights, latents and losses are fp32 in both"
    )
    compile: Compile = setting(
        "auto",
        resume="rounding",
        description="torch.compile of each block; graphs: with CUDA graphs; auto: on with CUDA, off on the CPU and "
        "with engine.kind=zero3",
    )
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    masking: MaskingSettings = MaskingSettings()
    model: ModelSettings = ModelSettings()
    decoder: DecoderSettings = DecoderSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    ema: EMASettings = EMASettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    telemetry: TelemetrySettings = TelemetrySettings()


@dataclass(frozen=True)
class Resolved:
    """A validated recipe, and where each of its values came from (by dotted key)."""

    recipe: Recipe
    origins: dict[str, str]
    notes: list[str]
    """Lines that a run prints when it starts."""


def sections() -> dict[str, type[Section]]:
    """Return the class of each section, by the section's name."""
    annotations = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {n: a for n, a in annotations.items() if isinstance(a, type) and issubclass(a, Section)}


def keys() -> list[str]:
    """Return every dotted key of a recipe, in the order in which recipes are printed."""
    known = sections()
    return [
        f"{name}.{key}" if name in known else name
        for name in Recipe.model_fields
        for key in (known[name].model_fields if name in known else [name])
    ]


def resume_of(key: str) -> Resume:
    """Return whether a run that is resumed may change a dotted key."""
    section, _, name = key.rpartition(".")
    return (sections()[section] if section else Recipe).resume_of(name)


FREE_KEYS = tuple(key for key in keys() if resume_of(key) != "fixed")
"""The keys that may change when a run is resumed."""


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return {dotted key: value} of the whole recipe, with the values as YAML has them."""
    values: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        values |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return values
