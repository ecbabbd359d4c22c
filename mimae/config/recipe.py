"""The trees of settings, one for each task, built from the settings class of each folder, and their dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from mimae.checkpoints.settings import CheckpointSettings
from mimae.config.section import Resume, Section, is_section, setting
from mimae.data.settings import DataSettings
from mimae.detection.settings import PRECISIONS, DetectSettings
from mimae.engines.settings import Compile, EngineSettings
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.objective.settings import ObjectiveSettings
from mimae.optim.settings import EMASettings, OptimizerSettings, ScheduleSettings
from mimae.segmentation.settings import SegmentSettings
from mimae.telemetry.settings import TelemetrySettings
from mimae.train.settings import RunSettings
from mimae.train.tasks.settings import AugmentSettings, EvaluationSettings, FinetuneSettings, HeadSettings


class RunRecipe(Section):
    """Settings of a training run of any task. Each task has a subclass with the sections that it adds."""

    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    """Measures of the task's evaluation, and which value is the best. checkpoint.best names one of them."""

    labels: ClassVar[tuple[str, ...]] = ()
    """Keys of files and folders with the labels of the images; a run keeps them as absolute paths."""
    of_validation: ClassVar[tuple[str, ...]] = ()
    """Keys that belong to the images of data.val_path: other images have others."""

    task: str
    """Name of the task, a key of `RECIPES`. If config.yaml of a run does not name it, the task is pretraining."""
    seed: int = Field(0, ge=0, lt=2**32, description="key of all random streams: masks, order, crops, weights")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="precision of the matrix products; weights, latents and losses are always fp32"
    )
    compile: Compile = setting(
        "auto",
        resume="rounding",
        description="torch.compile of each block; graphs: with CUDA graphs; auto: on with CUDA, off on the CPU and "
        "with engine.kind=zero3",
    )
    run: RunSettings = Field(default_factory=RunSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    ema: EMASettings = Field(default_factory=EMASettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)


class Recipe(RunRecipe):
    """The recipe of a pretraining run."""

    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = {"knn": "max", "val_rec": "min"}

    task: Literal["pretrain"] = Field(
        "pretrain", description="what the run learns; it determines the sections of the recipe"
    )
    masking: MaskingSettings = Field(default_factory=MaskingSettings)
    decoder: DecoderSettings = Field(default_factory=DecoderSettings)
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)


class TransferRecipe(RunRecipe):
    """Base class of recipes that train on a pretrained encoder."""

    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)


class ClassifyRecipe(TransferRecipe):
    """The recipe of a classifier: with a fine-tuned encoder, or linear on a frozen encoder."""

    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = {"top1": "max", "top5": "max", "val_loss": "min"}

    task: Literal["classify"] = Field("classify", description="what the run learns")
    head: HeadSettings = Field(default_factory=HeadSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)


class DetectRecipe(TransferRecipe):
    """The recipe of a detector."""

    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = dict.fromkeys(PRECISIONS, "max")
    labels: ClassVar[tuple[str, ...]] = (
        "detect.annotations",
        "detect.val_annotations",
        "detect.panoptic",
        "detect.val_panoptic",
    )
    of_validation: ClassVar[tuple[str, ...]] = ("detect.val_annotations", "detect.val_panoptic")

    task: Literal["detect"] = Field("detect", description="what the run learns")
    detect: DetectSettings = Field(default_factory=DetectSettings)


class SegmentRecipe(TransferRecipe):
    """The recipe of semantic segmentation."""

    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = {"miou": "max", "pixel_accuracy": "max"}
    labels: ClassVar[tuple[str, ...]] = ("segment.masks", "segment.val_masks")
    of_validation: ClassVar[tuple[str, ...]] = ("segment.val_masks",)

    task: Literal["segment"] = Field("segment", description="what the run learns")
    segment: SegmentSettings = Field(default_factory=SegmentSettings)


RECIPES: dict[str, type[RunRecipe]] = {
    "pretrain": Recipe,
    "classify": ClassifyRecipe,
    "segment": SegmentRecipe,
    "detect": DetectRecipe,
}
"""The class of each task's recipe. A section has the same class in every recipe that has it."""

R = TypeVar("R", bound=RunRecipe)


@dataclass(frozen=True)
class Resolved(Generic[R]):
    """A validated recipe, and the origin of each value by dotted key."""

    recipe: R
    origins: dict[str, str]
    notes: list[str]
    """Lines that a run prints when it starts."""


@cache
def sections(tree: type[RunRecipe] | None = None) -> dict[str, type[Section]]:
    """Return the class of each section by its name, for one task's recipe or for all."""
    trees = RECIPES.values() if tree is None else (tree,)
    annotations = {name: field.annotation for each in trees for name, field in each.model_fields.items()}
    return {name: kind for name, kind in annotations.items() if is_section(kind)}


@cache
def keys(tree: type[RunRecipe] | None = None) -> tuple[str, ...]:
    """Return every dotted key in the order in which recipes are printed, for one task's recipe or for all."""
    trees = tuple(RECIPES.values()) if tree is None else (tree,)
    known = sections()
    names = dict.fromkeys(name for each in trees for name in each.model_fields)
    return tuple(
        f"{name}.{key}" if name in known else name
        for name in names
        for key in (known[name].model_fields if name in known else [name])
    )


@cache
def schemas() -> dict[str, Any]:
    """Return the JSON schema of every dotted key; `task` has that of pretraining."""
    found = {key: schema for tree in RECIPES.values() for key, schema in tree.schemas().items()}
    return found | Recipe.schemas()


def resume_of(key: str) -> Resume:
    """Return whether a resumed run may change a dotted key: fixed, free or rounding."""
    section, _, name = key.rpartition(".")
    return (sections()[section] if section else Recipe).resume_of(name)


FREE_KEYS = tuple(key for key in keys() if resume_of(key) != "fixed")
"""The keys that a resumed run may change."""


def flat(recipe: RunRecipe) -> dict[str, Any]:
    """Return {dotted key: value} of the whole recipe, with JSON values."""
    values: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        values |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return values
