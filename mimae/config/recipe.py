"""The tree of settings: assembled from each part's own class, validated, explained.

All problems of a recipe are told at once, each with the key, the value, where the value came from and what is
legal.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mimae.checkpoints.checkpoint import CheckpointSettings
from mimae.config.layers import Setting, Settings, find, from_mapping, read, read_override, text, with_base
from mimae.config.section import Section
from mimae.data.settings import DataSettings
from mimae.engines.base import Compile, EngineSettings
from mimae.errors import UserError
from mimae.model.geometry import Grid
from mimae.model.masking import KINDS
from mimae.model.settings import SIZES, DecoderSettings, MaskingSettings, ModelSettings
from mimae.objective.settings import ObjectiveSettings
from mimae.objective.terms import active
from mimae.optim.optimizer import EMASettings, OptimizerSettings, ScheduleSettings
from mimae.telemetry.telemetry import TelemetrySettings


class RunSettings(Section):
    """Where a run lives, and when it is taken for hung."""

    dir: str = Field(
        "runs/unnamed",
        min_length=1,
        description="the run's directory; where no recipe or override names one: runs/ and the recipe's name",
    )
    dry: bool = Field(False, description="one step of everything, checkpoint included, then stop")
    first_step_timeout: float = Field(
        1800,
        ge=0,
        description="seconds until the first step of a start or of an epoch is done, and for checks and checkpoints; a "
        "run that takes longer ends with its ranks' stacks, to be started again; 0: no limit",
    )
    step_timeout: float = Field(300, ge=0, description="the same for all other steps")


class Recipe(Section):
    """Everything that a pretraining run depends on."""

    seed: int = Field(0, ge=0, lt=2**32, description="key of all random streams: masks, order, crops, weights")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of the matrix products; weights, latents and losses are fp32 in both"
    )
    compile: Compile = Field(
        "auto",
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


class ConfigError(UserError):
    """A recipe that cannot be run, with every reason found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the settings:", *problems]))


@dataclass(frozen=True)
class Resolved:
    """A validated recipe, and where each of its values came from (by dotted key)."""

    recipe: Recipe
    origins: dict[str, str]


_SIZED = {f"model.{name}" for size in SIZES.values() for name in size}

RecipeLike = str | Path | Mapping[str, Any] | Recipe


def load(recipe: RecipeLike, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Resolved:
    """Reads a recipe, applies overrides and then `settings`, validates.

    Args:
        recipe: a path, the name of a shipped recipe, a mapping of sections, or a Recipe.
        overrides: `section.key=value`, the value in YAML.
        settings: the same as a mapping of sections, for callers in Python.

    Raises:
        ConfigError: with all problems at once.
    """
    problems: list[str] = []
    name, layers = "unnamed", list[Settings]()
    if isinstance(recipe, str | Path):
        path = find(str(recipe), Path(), problems)
        if path is not None:
            name, layers = path.stem, read(path, problems)
    else:
        layers = with_base(from_mapping(recipe), Path(), problems)
    whole = not problems
    # One layer, whatever their order: a width that stands beside a size is meant.
    asked = Settings()
    for override in overrides:
        asked |= read_override(override, problems)
    given = _over([*layers, asked | from_mapping(settings or {})])
    given.setdefault("run.dir", Setting(f"runs/{name}", "from the recipe's name"))
    return _validate(given, problems, whole)


def _over(layers: Sequence[Settings]) -> Settings:
    """Each layer over those before it. A named size is the numbers that it stands for: what an earlier layer gave for
    them is for the model before."""
    given = Settings()
    for layer in layers:
        if "model.size" in layer:
            given = {key: setting for key, setting in given.items() if key not in _SIZED}
        given |= layer
    return given


# Validation


def _sections() -> dict[str, type[Section]]:
    annotations = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {n: a for n, a in annotations.items() if isinstance(a, type) and issubclass(a, Section)}


def keys() -> list[str]:
    """Every dotted key of a recipe, in the order in which recipes are printed."""
    sections = _sections()
    return [
        f"{name}.{key}" if name in sections else name
        for name in Recipe.model_fields
        for key in (sections[name].model_fields if name in sections else [name])
    ]


def _validate(given: Settings, problems: list[str], whole: bool) -> Resolved:
    """`whole`: every file was read, so that a missing key is a default and keys can be compared."""
    sections, known = _sections(), keys()
    tree: dict[str, Any] = {}
    for key, setting in given.items():
        if key in known:
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = setting.value
        elif key not in sections or setting.value is not None:  # a section without keys is no mistake
            problems.append(_unknown(key, setting, known, sections))
    try:
        # JSON, strict: lists become tuples there, and nothing else is converted ("4" to 4, true to 1).
        recipe = Recipe.model_validate_json(json.dumps(tree, default=str), strict=True)
        failed: set[str] = set()
    except ValidationError as error:
        failed = {str(detail["loc"][0]) for detail in error.errors()}
        problems += _illegal(error, given, sections)
        recipe = Recipe.model_validate_json(
            json.dumps({name: value for name, value in tree.items() if name not in failed}, default=str),
            strict=True,
        )
    origins = {key: _origin(key, given) for key in known}
    resolved = Resolved(recipe, origins)
    for needs, check in _CHECKS:
        if whole and not failed.intersection(needs):
            problems += check(resolved)
    if problems:
        raise ConfigError(problems)
    return resolved


def _origin(key: str, given: Settings) -> str:
    if key in _SIZED and (key not in given or given[key].value is None):
        return "from model.size"
    return given[key].origin if key in given else "default"


def _unknown(key: str, setting: Setting, known: list[str], sections: Mapping[str, type[Section]]) -> str:
    """An unknown key's message, with the nearest right one. The last part counts, the section breaks ties."""
    if key in sections:
        return (
            f"{key} = {text(setting.value)} ({setting.origin}): {key} is a section; "
            f"its keys are {', '.join(sections[key].model_fields)}"
        )
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> tuple[float, float]:
        other_section, _, other_name = candidate.rpartition(".")
        last = difflib.SequenceMatcher(None, name, other_name).ratio()
        whose = difflib.SequenceMatcher(None, section, other_section).ratio() if section else 0
        return last + 0.5 * whose, last

    nearest = max(known, key=likeness)
    if likeness(nearest)[1] >= 0.6:
        return f"{key} ({setting.origin}): unknown key; did you mean {nearest}?"
    whose, fields = (section, sections[section]) if section in sections else ("a recipe", Recipe)
    return f"{key} ({setting.origin}): unknown key; {whose} has {', '.join(fields.model_fields)}"


def _illegal(error: ValidationError, given: Settings, sections: Mapping[str, type[Section]]) -> Iterator[str]:
    """One message per illegal key, however many reasons pydantic has."""

    def told(key: str) -> str:
        return f"{key} = {text(given[key].value)} ({given[key].origin})" if key in given else key

    seen: set[str] = set()
    for detail in error.errors():
        section, *below = map(str, detail["loc"])
        key = f"{section}.{below[0]}" if section in sections and below else section
        if key in seen:
            continue
        seen.add(key)
        if detail["type"] != "value_error":
            yield f"{told(key)}: legal is {legal(key)}"
            continue
        # The owner's own check of its section: its text names the keys that it is about.
        reason = str(detail["ctx"]["error"])
        words = re.findall(r"\w+", reason)
        about = [told(k) for k in given if k.startswith(f"{section}.") and k.partition(".")[2] in words]
        yield f"{', '.join(about) or told(key)}: {reason}"


def legal(key: str) -> str:
    """The legal values of a dotted key, in words, from the constraints of its field."""
    section, _, name = key.rpartition(".")
    model = _sections()[section] if section else Recipe
    schema = model.model_json_schema()
    return _in_words(schema["properties"][name])


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(_in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(", ".join(map(text, schema["enum"])).rsplit(", ", 1))
    if "const" in schema:
        return text(schema["const"])
    kind = str(schema.get("type"))
    if kind == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        count = f"{len(items)} values" if "prefixItems" in schema else "values"
        each = list(dict.fromkeys(_in_words(item) for item in items))
        return f"a list of {count}, " + (f"each {each[0]}" if len(each) == 1 else " and ".join(each))
    words = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"{words[kind]} from {low} to {high}"
    bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
    limits = " and ".join(f"{word} {limit}" for word, limit in bounds if limit is not None)
    if schema.get("minLength"):
        limits = "that is not empty"
    return f"{words.get(kind, kind)} {limits}".rstrip()


# Checks of several keys together

_CHECKS: list[tuple[tuple[str, ...], Callable[[Resolved], Iterator[str]]]] = []


def _check(
    *sections: str,
) -> Callable[[Callable[[Resolved], Iterator[str]]], Callable[[Resolved], Iterator[str]]]:
    """Registers a check that needs these sections to be valid."""

    def register(check: Callable[[Resolved], Iterator[str]]) -> Callable[[Resolved], Iterator[str]]:
        _CHECKS.append((sections, check))
        return check

    return register


@_check("data", "masking", "model")
def _masks_fit(resolved: Resolved) -> Iterator[str]:
    recipe, patch, size_hw = resolved.recipe, resolved.recipe.model.patch_size, resolved.recipe.data.size_hw
    image_size, patch_size = _say(resolved, "data.image_size"), _say(resolved, "model.patch_size")
    if any(side % patch for side in size_hw):
        near = " x ".join(str(max(round(side / patch), 1) * patch) for side in size_hw)
        yield f"{image_size}: each side must be divisible by {patch_size}; the nearest is {near}"
        return
    patches = Grid.of(size_hw, patch).patches
    if patches < 2:
        yield f"{image_size}: one patch ({patch_size}); an image needs at least 2, one visible and one hidden"
        return
    visible = recipe.masking.num_visible(patches)
    if KINDS[recipe.masking.kind].is_disjoint and recipe.masking.num_masks * visible > patches:
        others = " or ".join(name for name, kind in KINDS.items() if not kind.is_disjoint)
        yield (
            f"{_say(resolved, 'masking.num_masks')}: at most {patches // visible} masks that show {visible} "
            f"patches each ({_say(resolved, 'masking.ratio')}) are disjoint in an image of {patches}; "
            f"a higher masking.ratio or masking.kind={others} allows more"
        )


@_check("model")
def _encoder_shape(resolved: Resolved) -> Iterator[str]:
    return _transformer_shape(resolved, "model")


@_check("decoder")
def _decoder_shape(resolved: Resolved) -> Iterator[str]:
    return _transformer_shape(resolved, "decoder")


def _transformer_shape(resolved: Resolved, section: Literal["model", "decoder"]) -> Iterator[str]:
    settings = getattr(resolved.recipe, section)
    if settings.width % settings.heads:
        divisors = [str(n) for n in range(1, min(settings.width, 64) + 1) if settings.width % n == 0]
        yield (
            f"{_say(resolved, f'{section}.heads')}: does not divide {_say(resolved, f'{section}.width')}; "
            f"legal are {', '.join(divisors)}"
        )
    if settings.width % 4:
        yield f"{_say(resolved, f'{section}.width')}: sin-cos positions need a multiple of 4"


@_check("schedule")
def _batch_splits(resolved: Resolved) -> Iterator[str]:
    schedule = resolved.recipe.schedule
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    parts = ranks * schedule.accumulate
    if schedule.batch_size % parts:
        below = schedule.batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        yield (
            f"{_say(resolved, 'schedule.batch_size')}: must be divisible by {parts} = ranks ({ranks}) x "
            f"{_say(resolved, 'schedule.accumulate')}, as {near} is"
        )


@_check("schedule")
def _warmup_ends(resolved: Resolved) -> Iterator[str]:
    if resolved.recipe.schedule.warmup_epochs > resolved.recipe.schedule.epochs:
        yield (
            f"{_say(resolved, 'schedule.warmup_epochs')}: longer than the run; "
            f"legal is at most {_say(resolved, 'schedule.epochs')}"
        )


@_check("masking", "objective")
def _siblings(resolved: Resolved) -> Iterator[str]:
    if resolved.recipe.masking.num_masks > 1:
        return
    for key in _weights_of_terms_that_compare("views", resolved.recipe):
        yield (
            f"{_say(resolved, key)}: compares the views of an image, and there is one: "
            f"{_say(resolved, 'masking.num_masks')}; legal are at least 2 masks, or {key}=0"
        )


@_check("decoder", "masking")
def _next_view(resolved: Resolved) -> Iterator[str]:
    masking = resolved.recipe.masking
    if resolved.recipe.decoder.predict != "next_view" or (KINDS[masking.kind].is_disjoint and masking.num_masks > 1):
        return
    disjoint = " or ".join(name for name, kind in KINDS.items() if kind.is_disjoint)
    yield (
        f"{_say(resolved, 'decoder.predict')}: predicts what another view shows and this one does not; legal are at "
        f"least 2 {disjoint} masks (here {_say(resolved, 'masking.kind')}, {_say(resolved, 'masking.num_masks')}), "
        "or decoder.predict=hidden"
    )


@_check("schedule", "objective")
def _other_images(resolved: Resolved) -> Iterator[str]:
    recipe = resolved.recipe
    if recipe.schedule.batch_size // recipe.schedule.accumulate > 1:
        return
    for key in _weights_of_terms_that_compare("images", recipe):
        yield (
            f"{_say(resolved, key)}: compares the images of a micro-batch, which has one "
            f"({_say(resolved, 'schedule.batch_size')}, {_say(resolved, 'schedule.accumulate')}); "
            f"legal are at least 2 images, or {key}=0"
        )


def _weights_of_terms_that_compare(what: Literal["views", "images"], recipe: Recipe) -> list[str]:
    """Return the keys of the weights of those terms in use that need two views or two images."""
    return [f"objective.{term.weight}" for term in active(recipe.objective) if what in term.compares]


@_check("checkpoint", "telemetry", "data")
def _best_is_measured(resolved: Resolved) -> Iterator[str]:
    recipe = resolved.recipe
    if recipe.checkpoint.best is None or (recipe.telemetry.probe_every_epochs and recipe.data.val_path):
        return
    yield (
        f"{_say(resolved, 'checkpoint.best')}: measured on data.val_path every telemetry.probe_every_epochs epochs; "
        "legal is null, or set both"
    )


def _say(resolved: Resolved, key: str) -> str:
    """`key = value (origin)`."""
    return f"{key} = {text(flat(resolved.recipe)[key])} ({resolved.origins[key]})"


# Printing


def flat(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value} of the whole recipe, values as YAML has them."""
    values: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        values |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return values


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that loads again to an equal recipe."""
    return "\n".join(line for _, line in _lines(recipe)) + "\n"


def explain(resolved: Resolved) -> str:
    """The recipe as YAML, the origin of each value in a comment."""
    lines = _lines(resolved.recipe)
    column = min(max(len(line) for _, line in lines), 60)
    return "".join(
        f"{line:<{column}}  # {resolved.origins[key]}\n" if key in resolved.origins else f"{line}\n"
        for key, line in lines
    )


def _lines(recipe: Recipe) -> list[tuple[str, str]]:
    """(dotted key, line) of every key and section, in order."""
    lines = []
    for name, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            lines.append((name, f"{name}:"))
            lines += [(f"{name}.{key}", f"  {key}: {text(leaf)}") for key, leaf in value.items()]
        else:
            lines.append((name, f"{name}: {text(value)}"))
    return lines


def reference() -> str:
    """Markdown tables of every key: default, legal values, meaning."""
    sections = _sections()
    scalars = [name for name in Recipe.model_fields if name not in sections]
    parts = [
        "# Settings\n\nEvery key of a recipe, its default, its legal values and its meaning. "
        "`mimae config RECIPE [key=value ...]` prints what a recipe resolves to. "
        "This page is the output of `mimae settings`.\n",
        _table("", scalars, Recipe),
    ]
    for name, section in sections.items():
        meaning = " ".join((section.__doc__ or "").split("\n\n")[0].split())
        parts.append(f"## {name}\n\n{meaning}\n\n{_table(f'{name}.', list(section.model_fields), section)}")
    return "\n".join(parts)


def _table(prefix: str, names: list[str], model: type[Section]) -> str:
    rows = ["| key | default | legal | meaning |", "|---|---|---|---|"]
    defaults = model().model_dump(mode="json")
    for name in names:
        meaning = model.model_fields[name].description or ""
        row = [f"`{prefix}{name}`", f"`{text(defaults[name])}`", legal(f"{prefix}{name}"), meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(rows) + "\n"
