"""Predictions for the stages of `mimae bench gpu`: the cost model of docs/budget.md at the stages' own settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mimae.bench.gpu.stages import STAGES, Stage
from mimae.bench.step import budget
from mimae.bench.step.contenders import OURS
from mimae.config.load import load_recipe

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""A checkout has them, an installed wheel does not."""


def predictions() -> dict[str, str]:
    """Return the predictions as text, by stage; none where the counted bytes are missing."""
    files = [RESULTS / f"{name}.json" for name in ("budget", "traffic")]
    if not all(file.exists() for file in files):
        return {}
    counts, traffic = (json.loads(file.read_text()) for file in files)
    found = {stage.name: "; ".join(_predicted(stage, counts, traffic)) for stage in STAGES}
    return {name: text for name, text in found.items() if text}


def _predicted(stage: Stage, counts: Mapping[str, Any], traffic: Mapping[str, Any]) -> Iterator[str]:
    for name, recipe, overrides in _steps(stage):
        found = load_recipe(recipe, overrides).recipe
        step = budget.predict(found, budget.counts_of(found, counts), budget.ops_bytes(found, traffic))
        rate, mfu = budget.speed(found, step)
        yield f"{name} {rate:,.0f} images/s, {step.step:.1f} ms, MFU {100 * mfu:.0f} %".strip()


def _steps(stage: Stage) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name, the recipe and the overrides of each step that the cost model covers.

    It knows neither the way in which attention is computed nor CUDA graphs nor other systems.
    """
    given = stage.arguments
    if stage.name == "pretrain, plain":
        yield "", "vit_base_400ep", [each for each in given if each.startswith("schedule.")]
    if given[:3] != ["mimae", "bench", "step"] or "--peer" in given or "--memory" in given:
        return
    values = dict(pairwise(given))
    recipe, size = values["--recipe"], f"schedule.batch_size={values['--batch']}"
    yield OURS, recipe, [size]
    for option, variant in pairwise(given):
        if option == "--variant" and not variant.startswith("model.attention="):
            yield f"`{variant}`", recipe, [size, *variant.split()]
