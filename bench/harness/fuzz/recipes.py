"""Fuzzing of settings: values of every key, as overrides, mappings and files. Without torch, so that forks are fast."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mimae.bench.harness.fuzz.case import Case, Content, Special
from mimae.bench.harness.fuzz.draws import ODD_TEXTS, odd, yaml_text
from mimae.bench.harness.fuzz.forked import Wrong
from mimae.bench.harness.fuzz.kind import Kind
from mimae.config.layers import shipped, text
from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml, explain
from mimae.config.recipe import RECIPES, RunRecipe, flat, keys, schemas
from mimae.errors import ConfigError

TINY = """
precision: fp32
data: {path: images, image_size: 8, workers: 0, loader: torch}
model: {size: tiny, patch_size: 2, width: 16, depth: 1, heads: 2}
decoder: {width: 8, depth: 1, heads: 2}
objective: {projector: mlp, gate_loss: 5.0, posterior_width: 4}
schedule: {batch_size: 8, epochs: 2, warmup_epochs: 1, max_steps: 2}
ema: {decay: 0.5}
checkpoint: {every_steps: 1}
telemetry: {log_every_steps: 1, probe_every_epochs: 0, images_every_epochs: 0, trackers: []}
"""
"""A recipe that trains two steps within a second, with every part that has state."""

_SHIPPED = {
    "pretrain": "quickstart",
    "classify": "finetune_cifar10",
    "segment": "segment_small",
    "detect": "detect_coco_vit_base",
}
"""A shipped recipe of each task."""


@lru_cache(1)
def every_key() -> list[str]:
    return list(keys())


@lru_cache(1)
def _plain() -> dict[str, Any]:
    """Return the default of each key of every task."""
    return {key: value for recipe in RECIPES.values() for key, value in flat(recipe.model_validate({})).items()}


def likely(draw: random.Random, key: str) -> Any:
    """Return a value that a key's schema allows, or almost allows."""
    options = schemas()[key].get("anyOf", [schemas()[key]])
    schema = draw.choice(options)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if kind == "boolean":
        return draw.random() < 0.5
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + 8))
        if kind == "integer":
            return draw.choice(
                (
                    low,
                    low + 1,
                    low + 2,
                    high,
                    2,
                    3,
                    4,
                    8,
                    draw.randint(int(low), max(int(low), min(int(high), int(low) + 64))),
                )
            )
        return draw.choice((low, high, (low + high) / 2, draw.uniform(low, high)))
    if kind == "null":
        return None
    if kind == "array":
        return [draw.choice((0.0, 0.5, 1.0, 8, 16)) for _ in range(len(schema.get("prefixItems", [0, 0])))]
    return draw.choice((_plain()[key], *ODD_TEXTS))


def _value(draw: random.Random, key: str) -> Any:
    return likely(draw, key) if key in schemas() and draw.random() < 0.4 else odd(draw)


def _written(draw: random.Random, value: Any) -> str:
    if draw.random() < 0.5 and isinstance(value, str):
        return value
    try:
        return text(value)
    except (yaml.YAMLError, ValueError):
        return json.dumps(value)


def _key(draw: random.Random, task: str) -> str:
    key = draw.choice(keys(RECIPES[task]) if draw.random() < 0.95 else every_key())
    if draw.random() < 0.06:
        return draw.choice(
            (key + "s", key.upper(), key.partition(".")[0], "", ".", key + ".x", str(draw.choice(ODD_TEXTS))[:80])
        )
    return key


def make(draw: random.Random) -> Case:
    """Draw a recipe of any task (a shipped one, a file, a file with a base, or a mapping) and overrides."""
    overrides = []
    task = draw.choice(("pretrain", *RECIPES))
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        key = _key(draw, task)
        overrides.append(f"{key}={_written(draw, _value(draw, key))}" if draw.random() < 0.97 else str(odd(draw)))
    chance = draw.random()
    if chance < 0.3:
        return Case(
            {}, [draw.choice((*shipped(), *ODD_TEXTS)) if draw.random() < 0.2 else _SHIPPED[task], "", *overrides]
        )
    tree: dict[Any, Any] = {} if task == "pretrain" else {"task": task}
    for _ in range(draw.choice((1, 2, 4, 12))):
        key = _key(draw, task)
        section, _, name = key.rpartition(".")
        inner = tree.setdefault(section, {}) if section else tree
        if isinstance(inner, dict):
            inner[name] = _value(draw, key)
    if chance < 0.45:
        return Case({}, ["", json.dumps(tree), *overrides])
    files: dict[str, Content] = {"recipe.yaml": yaml_text(draw, tree)}
    if draw.random() < 0.25:
        base = draw.choice(
            (
                _SHIPPED[task],
                "base.yaml",
                "./base.yaml",
                "recipe.yaml",
                "/dev/zero",
                "../canary/file",
                "base",
                *ODD_TEXTS,
            )
        )
        files["recipe.yaml"] = yaml_text(draw, {"base": base} | tree)
        files["base.yaml"] = draw.choice(
            (
                yaml_text(draw, {"seed": 1}),
                b"base: recipe.yaml\n",
                Special("fifo"),
                Special("sparse", str(10**13)),
                Special("link", "base.yaml"),
                Special("folder"),
            )
        )
    return Case(files, ["recipe.yaml", "", *overrides])


def use(folder: Path, case: Case) -> str:
    """Load a recipe, print it and load the printed text: the results have to be equal."""
    name, mapping, *overrides = case.words
    resolved = load_recipe(json.loads(mapping) if mapping else name, overrides, None, RunRecipe)
    written = folder / "printed.yaml"
    for printed in (as_yaml(resolved.recipe), explain(resolved)):
        written.write_text(printed)
        try:
            again = load_recipe(written, (), None, RunRecipe).recipe
        except ConfigError as error:
            raise Wrong(f"the output of `mimae config` is refused: {error}") from error
        if again != resolved.recipe:
            mine, other = flat(resolved.recipe), flat(again)
            differ = [(key, mine[key], other[key]) for key in mine if mine[key] != other[key]]
            raise Wrong(f"a recipe differs after printing and reading it: {differ!r}")
    return ""


SETTINGS = Kind(make, use, schemas, memory=300 << 20)
