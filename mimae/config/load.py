"""Loading of a recipe: its files and overrides are merged, then validated.

All problems of a recipe are reported at once, each with the key, the value, its origin and the legal values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import ValidationError

from mimae.config.checks import CHECKS
from mimae.config.layers import (
    Setting,
    Settings,
    expand_paths,
    find,
    from_mapping,
    read,
    read_override,
    text,
    with_base,
)
from mimae.config.recipe import RECIPES, R, Recipe, Resolved, RunRecipe, keys, sections
from mimae.config.renamed import under_new_names
from mimae.config.texts import text_keys
from mimae.config.words import elsewhere, illegal, strange_task, unknown
from mimae.data.settings import DataSettings
from mimae.errors import ConfigError
from mimae.model.settings import SIZES

RecipeLike = str | Path | Mapping[str, Any] | RunRecipe

_UNKNOWN = 20
"""Maximal number of unknown keys that are reported one by one."""

_SIZED = {f"model.{name}" for size in SIZES.values() for name in size}


@overload
def load_recipe(
    recipe: RecipeLike, overrides: Sequence[str] = ..., settings: Mapping[str, Any] | None = ...
) -> Resolved[Recipe]: ...


@overload
def load_recipe(
    recipe: RecipeLike, overrides: Sequence[str], settings: Mapping[str, Any] | None, kind: type[R]
) -> Resolved[R]: ...


def load_recipe(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    kind: type[RunRecipe] = Recipe,
) -> Resolved[Any]:
    """Read a recipe, apply overrides and then `settings`, and validate the result.

    Args:
        recipe: a path, the name of a shipped recipe, a mapping of sections, or a recipe.
        overrides: `section.key=value`, with the value in YAML.
        settings: overrides as a mapping of sections, for callers in Python.
        kind: the class of recipe that the caller can use; `RunRecipe` stands for every task.

    Raises:
        ConfigError: if there are problems; it has all of them.
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
    # All overrides are one layer, so their order does not matter: a width next to a size overrides the size's width.
    asked, is_text = Settings(), text_keys(*RECIPES.values())
    for override in overrides:
        asked |= read_override(override, problems, is_text.texts)
    layers.append(asked | from_mapping(settings or {}))
    # The paths of a Recipe object were expanded when it was made.
    done = layers[:-1] if isinstance(recipe, RunRecipe) else []
    expanded = [expand_paths(layer, is_text.paths, problems) for layer in layers[len(done) :]]
    given = _over([under_new_names(layer) for layer in (*done, *expanded)])
    given.setdefault("run.dir", Setting(f"runs/{name}", "from the recipe's name"))
    if "data.val_path" in given and given["data.val_path"].note:
        given |= _started_with(given)
    return _validate(given, problems, whole, kind)


def _over(layers: Sequence[Settings]) -> Settings:
    """Merge the layers; a later layer replaces values of earlier ones.

    A named size stands for its numbers: a layer with a size removes the numbers that earlier layers set for another
    size. A validation set belongs to the training images of the same layer: a layer that names other training images
    and no validation set has no validation set.
    """
    given = Settings()
    for layer in layers:
        if "model.size" in layer:
            given = {key: setting for key, setting in given.items() if key not in _SIZED}
        given = given | _without_validation(given, layer) | layer
    return given


def _without_validation(given: Settings, layer: Settings) -> Settings:
    """Return data.val_path=null if `layer` replaces data.path but not data.val_path, else nothing.

    The inherited data.val_path would belong to the images that are replaced.
    """
    path, validation = layer.get("data.path"), given.get("data.val_path")
    if path is None or validation is None or validation.value is None or "data.val_path" in layer:
        return {}
    replaced = given["data.path"].value if "data.path" in given else DataSettings().path
    if path.value == replaced:
        return {}
    why = (
        f"no validation set: {text(validation.value)} ({validation.origin}) belongs to data.path={text(replaced)}, "
        f"which is replaced ({path.origin})"
    )
    note = f"{why}; the run has no evaluation on held-out images; data.val_path=PATH sets them"
    return {"data.val_path": Setting(None, why, note)}


def _started_with(given: Settings) -> Settings:
    """Return the data.val_path of the run in run.dir, if there is a run with the data.path of `given`.

    A resumed run keeps the validation set with which it was started. A config.yaml that is not a recipe is reported
    later, by the run.
    """
    file = Path(str(given["run.dir"].value), "config.yaml")
    if not file.is_file():
        return {}
    started = _over(read(file.resolve(), []))
    if "data.val_path" not in started or started.get("data.path", Setting(None, "")).value != given["data.path"].value:
        return {}
    return {"data.val_path": started["data.val_path"]}


def _validate(given: Settings, problems: list[str], whole: bool, kind: type[RunRecipe]) -> Resolved[Any]:
    """Return the recipe of the given settings. Raises ConfigError with `problems` and all problems found here.

    `whole` is True if every file was read: then a missing key has its default, and keys can be compared.
    """
    task = given["task"].value if "task" in given else "pretrain"
    tree = RECIPES.get(str(task), Recipe)
    if whole and (tree.model_fields["task"].default != task or not issubclass(tree, kind)):
        problems.append(strange_task(given, kind))
        # Otherwise every key of the other task would be reported as a problem.
        raise ConfigError(problems)
    by_name, known = sections(tree), keys(tree)
    values: dict[str, Any] = {}
    strange = []
    for key, setting in given.items():
        if key in known:
            section, _, name = key.rpartition(".")
            (values.setdefault(section, {}) if section else values)[name] = setting.value
        elif key not in by_name or setting.value is not None:  # A section without keys is no mistake.
            strange.append(key)
    # It takes time to find the nearest known key of each, and nobody reads thousands of messages.
    problems += [elsewhere(key, given[key], tree) or unknown(key, given[key], tree) for key in strange[:_UNKNOWN]]
    if more := strange[_UNKNOWN:]:
        problems.append(f"and {len(more):,} more unknown keys, the last {more[-1][:80]}")
    try:
        # Strict JSON converts lists to tuples, and nothing else (not "4" to 4, not true to 1).
        recipe = tree.model_validate_json(json.dumps(values, default=str), strict=True)
        failed: set[str] = set()
    except ValidationError as error:
        failed = {str(detail["loc"][0]) for detail in error.errors()}
        problems += illegal(error, given)
        recipe = tree.model_validate_json(
            json.dumps({name: value for name, value in values.items() if name not in failed}, default=str),
            strict=True,
        )
    notes = [setting.note for setting in given.values() if setting.note]
    resolved = Resolved(recipe, {key: _origin(key, given) for key in known}, notes)
    for needs, check in CHECKS:
        if whole and by_name.keys() >= set(needs) and not failed.intersection(needs):
            problems += check(resolved)
    if problems:
        raise ConfigError(problems)
    return resolved


def _origin(key: str, given: Settings) -> str:
    if key in _SIZED and (key not in given or given[key].value is None):
        return "from model.size"
    return given[key].origin if key in given else "default"
