"""Recipes of tiny models for tests of the tasks that fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimae.config.load import load_recipe
from mimae.config.recipe import R

TINY: Mapping[str, Mapping[str, Any]] = {
    "data": {"workers": 0},
    "model": {"size": "tiny", "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "attention": "sdpa"},
    "finetune": {"layer_decay": 0.75, "drop_path": 0.2},
    "optimizer": {"scale_by": "none", "betas": [0.9, 0.999]},
    "schedule": {"warmup_epochs": 0, "accumulate": 2},
    "telemetry": {"log_every_steps": 1, "probe_every_epochs": 1, "trackers": []},
}
"""Sections of a run on the CPU that logs and evaluates often, with layer decay, drop path and two micro-batches.

The attention is named: `auto` is measured when a run starts, so that two runs could differ in bits.
"""


def tiny(kind: type[R], run: Path, overrides: Sequence[str], **sections: Mapping[str, Any]) -> R:
    """Return the recipe of a tiny model: TINY, then `sections` key by key, then `overrides`."""
    names = dict.fromkeys((*TINY, *sections))
    tree: dict[str, Any] = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in names}
    tree |= {"task": kind.model_fields["task"].default, "precision": "fp32", "run": {"dir": str(run)}}
    return load_recipe(tree, overrides, None, kind).recipe
