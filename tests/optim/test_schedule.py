"""Tests of the learning rate of each step against the formulas of the published recipes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mimae.config.load import load_recipe
from mimae.errors import ConfigError
from mimae.optim.schedule import schedule_factor, total_steps
from mimae.optim.settings import ScheduleSettings

PER_EPOCH = 50


def rates(peak: float = 1.0, **settings: Any) -> list[float]:
    """Return the learning rate of every step of a run of 10 epochs with 2 of warm-up and the given peak."""
    schedule = load_recipe({"schedule": {"epochs": 10, "warmup_epochs": 2, **settings}}).recipe.schedule
    steps = total_steps(schedule, PER_EPOCH)
    assert steps == 500
    return [peak * schedule_factor(schedule, step, PER_EPOCH, peak) for step in range(steps)]


@pytest.mark.parametrize("settings", [{}, {"shape": "linear"}, {"shape": "constant"}])
def test_warm_up_is_linear_whatever_comes_after(settings: dict[str, Any]) -> None:
    assert rates(**settings)[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])


def test_cosine_goes_to_nothing() -> None:
    expected = [(1 + math.cos(math.pi * k / 400)) / 2 for k in range(400)]
    assert rates()[100:] == pytest.approx(expected)


def test_cosine_goes_to_the_floor_as_in_mae_fine_tuning() -> None:
    """The rate is min + (peak - min) (1 + cos) / 2, which MAE's main_finetune.py then scales by the layer's share."""
    peak, floor = 2e-3, 1e-6
    expected = [floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * k / 400)) for k in range(400)]
    assert rates(peak, floor=floor)[100:] == pytest.approx(expected, rel=1e-12)


def test_linear_is_poly_of_power_one() -> None:
    """The rate is (peak - min) (1 - k / steps) + min, as in mmsegmentation's PolyLR."""
    peak, floor = 1e-4, 1e-5
    expected = [(peak - floor) * (1 - k / 400) + floor for k in range(400)]
    assert rates(peak, shape="linear", floor=floor)[100:] == pytest.approx(expected, rel=1e-12)


def test_steps_drop_at_their_epochs() -> None:
    """In detection the rate is multiplied by 0.1 at two steps."""
    found = rates(shape="steps", drop_epochs=[8.5, 9.0], drop_factor=0.1)
    assert found[100:] == pytest.approx([1.0] * (425 - 100) + [0.1] * 25 + [0.01] * 50)


def test_constant_stays() -> None:
    assert rates(shape="constant")[100:] == [1.0] * 400


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shape": "constant", "floor": 1e-6}, "floor applies to shape=cosine and shape=linear"),
        ({"shape": "steps"}, "drop_epochs and shape=steps go together"),
        ({"drop_epochs": [3.0]}, "drop_epochs and shape=steps go together"),
    ],
)
def test_a_key_of_another_shape_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        rates(**settings)


def mae_share(epoch: float, warmup_epochs: float, epochs: float) -> float:
    """Return the share of the peak rate at a fractional epoch in MAE's code, which sets the rate before each step."""
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    return (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2


@pytest.mark.parametrize(("warmup", "per_epoch"), [(2.0, 50), (0.7, 5), (0.0, 7)])
def test_a_warmup_from_zero_has_the_rates_of_mae(warmup: float, per_epoch: int) -> None:
    """Cases are the warm-up of quickstart_mae, one of 3.5 steps, and none."""
    schedule = ScheduleSettings(epochs=6, warmup_epochs=warmup, warmup_from_zero=True)
    for step in range(6 * per_epoch):
        share = schedule_factor(schedule, step, per_epoch, 1.0)
        assert share == pytest.approx(mae_share(step / per_epoch, warmup, 6), rel=1e-12, abs=1e-12), step


def test_a_warmup_is_of_whole_steps_and_its_first_step_is_taken() -> None:
    schedule = ScheduleSettings(epochs=6, warmup_epochs=0.8)  # 4 steps of 5 an epoch
    shares = [schedule_factor(schedule, step, 5, 1.0) for step in range(30)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[5:] == pytest.approx([mae_share(step, 4, 30) for step in range(5, 30)])
