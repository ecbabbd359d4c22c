"""Tests of the messages before the first step."""

from __future__ import annotations

import pytest

from mimae.config.load import load_recipe
from mimae.train.start import hints


@pytest.mark.parametrize(
    ("overrides", "steps", "told"),
    [
        (
            ["schedule.warmup_epochs=2", "schedule.max_steps=20"],
            20,
            "the run ends inside its warm-up: it has 20 steps (sch",
        ),
        (
            ["schedule.warmup_epochs=2", "schedule.epochs=2"],
            200,
            "the run ends inside its warm-up: it has 200 steps, and",
        ),
        (["ema.decay=0.999"], 500, "the average of the weights reaches back 1 / (1 - ema.decay) = 1000 steps"),
        (["schedule.warmup_epochs=2"], 1, ""),
        (["schedule.resolution=[[16, 0.01], [32, 0.99]]"], 20, "no step has images of 16 px: the run has 20 steps, to"),
        (["schedule.resolution=[[16, 0.1], [32, 0.9]]"], 20, ""),
        (
            ["schedule.resolution=[[16, 0.1], [32, 0.9]]", "run.dry=true"],
            20,
            "a dry run takes one step, with images of that step's size; 32 px come after step 2",
        ),
        (["schedule.warmup_epochs=2"], 201, ""),
        (["ema.decay=0.999"], 1001, ""),
    ],
)
def test_a_schedule_that_the_run_does_not_reach_is_told(overrides: list[str], steps: int, told: str) -> None:
    """Check schedules of runs with 100 steps per epoch; a run of one step, as in a dry run, has no schedule."""
    recipe = load_recipe("quickstart", ["schedule.warmup_epochs=0", *overrides]).recipe
    found = list(hints(recipe, steps, 100))
    assert [line.startswith(told) for line in found] == [True] * bool(told), found


def test_the_warm_up_that_is_advised_is_reached() -> None:
    recipe = load_recipe("quickstart", ["schedule.warmup_epochs=2", "schedule.max_steps=20"]).recipe
    (line,) = hints(recipe, 20, 100)
    advised = float(line.rpartition("=")[2])
    again = load_recipe("quickstart", [f"schedule.warmup_epochs={advised}", "schedule.max_steps=20"]).recipe
    assert not list(hints(again, 20, 100))
