"""Tests of the list of terms: the declarations that other parts use agree with what the terms compute."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from mimae.config.load import load_recipe
from mimae.errors import ConfigError
from mimae.model.groups import groups
from mimae.model.masking import views
from mimae.model.mimae import MIMAE, build
from mimae.objective.objective import Losses
from mimae.objective.settings import ObjectiveSettings
from mimae.objective.terms import DIAGNOSTICS, ESTIMATES, LOSSES, TERMS, Term, active
from mimae.optim.groups import MAIN
from mimae.optim.settings import OptimizerSettings
from mimae.telemetry.records import EPOCH_KEYS, STEP_KEYS

WEIGHTED = [term for term in TERMS if term.weight is not None]


def forward(weights: dict[str, float], gate: float = 1.0) -> tuple[MIMAE, Losses]:
    """Return a small model with these weights, and its losses on two images."""
    tree: dict[str, Any] = {
        "data": {"image_size": [8, 12]},
        "masking": {"num_masks": 2, "ratio": 0.5},
        "model": {"patch_size": 4, "width": 16, "depth": 1, "heads": 2},
        "decoder": {"width": 8, "depth": 1, "heads": 2},
        "schedule": {"batch_size": 2},
        "objective": {"posterior_width": 5, **weights},
    }
    recipe = load_recipe(tree).recipe
    model = build(recipe)
    model.objective.gate.weight.fill_(gate)
    images = torch.randint(0, 256, (2, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return model, model(images, *views(recipe, 0, 0, torch.arange(2)))


def test_terms_report_the_columns_that_they_declare_and_no_others() -> None:
    _, losses = forward({term.weight: 0.5 for term in WEIGHTED if term.weight})
    assert list(losses.columns) == [*LOSSES, *ESTIMATES, *DIAGNOSTICS]
    assert set(LOSSES) <= set(STEP_KEYS) and set(losses.columns) <= set(EPOCH_KEYS)


@pytest.mark.parametrize("term", WEIGHTED, ids=lambda term: term.name)
def test_a_term_of_weight_0_costs_and_reports_nothing(term: Term) -> None:
    assert term.weight is not None
    off = {each.weight: 0.0 for each in WEIGHTED if each.weight}
    (model, without), (_, alone) = forward(off), forward(off | {term.weight: 0.5})
    assert list(without.columns) == ["loss", "rec"]
    assert not list(model.objective.parameters())
    assert set(alone.columns) == {"loss", "rec", term.name, *term.losses, *term.estimates, *term.diagnostics}
    assert alone.columns["loss"] != without.columns["loss"]


@pytest.mark.parametrize("term", WEIGHTED, ids=lambda term: term.name)
def test_a_negative_weight_and_too_few_views_or_images_are_refused(term: Term) -> None:
    assert term.weight is not None
    off = [f"objective.{each.weight}=0" for each in WEIGHTED]
    key = f"objective.{term.weight}"
    with pytest.raises(ConfigError, match=f"{key} = -1"):
        load_recipe({}, [f"{key}=-1"])
    shortages = {"views": "masking.num_masks=1", "images": "schedule.batch_size=1"}
    for what, shortage in shortages.items():
        try:
            load_recipe({}, [*off, f"{key}=0.5", shortage])
        except ConfigError as error:
            assert what in term.compares and key in str(error)
        else:
            assert what not in term.compares


@pytest.mark.parametrize("term", WEIGHTED, ids=lambda term: term.name)
def test_gated_terms_wait_for_the_gate(term: Term) -> None:
    """A term adds its loss with weight 0.5 if the gate is open; V's likelihood is not gated."""
    assert term.weight is not None
    weights = {each.weight: 0.5 if each is term else 0.0 for each in WEIGHTED if each.weight}
    (_, opened), (_, closed) = forward(weights), forward(weights, gate=0.0)
    gained = float(opened.columns["loss"] - closed.columns["loss"])
    assert gained == pytest.approx(0.5 * float(opened.columns[term.name]) if term.is_gated else 0.0, rel=1e-3)


def test_a_terms_own_group_is_one_of_the_optimizers() -> None:
    model, _ = forward({})
    rule = groups(OptimizerSettings(), 2, 2)
    clips = {rule(name, parameter.shape).clip for name, parameter in model.named_parameters()}
    assert {term.group for term in active(ObjectiveSettings()) if term.group} == clips - {MAIN}


def test_the_lists_that_settings_and_records_ask_need_no_torch() -> None:
    lists = "mimae.objective.terms, mimae.objective.costs, mimae.model.geometry, mimae.config.checks"
    subprocess.run([sys.executable, "-c", f"import sys, {lists}; assert 'torch' not in sys.modules"], check=True)
