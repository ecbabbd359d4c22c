"""Mixup and cutmix: what is mixed, the distributions, and timm's arithmetic under the same weights."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from mimae.data.pixels import mix
from mimae.train.tasks.settings import AugmentSettings

BOTH = AugmentSettings(mixup=0.8, cutmix=1.0)


def uniforms(seed: int) -> Iterator[float]:
    generator = random.Random(seed)
    while True:
        yield 1 - generator.random()


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_weights_are_of_the_beta_distribution(alpha: float) -> None:
    """Moments of 4,000 draws, against Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)), and its share below 0.1 by
    numpy; tolerances are four deviations."""
    stream = uniforms(0)
    drawn = np.array([mix.beta(alpha, stream) for _ in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert drawn.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert drawn.var() == pytest.approx(variance, abs=0.01)
    theirs = np.random.default_rng(0).beta(alpha, alpha, 100_000)
    assert (drawn < 0.1).mean() == pytest.approx((theirs < 0.1).mean(), abs=4 * math.sqrt(0.25 / 4000))


def test_numbers_too_small_for_a_float_have_a_weight() -> None:
    assert mix.beta(0.01, iter([1e-9, 1e-10])) == pytest.approx(1.0)


def test_half_of_the_steps_are_cut_and_the_step_alone_decides() -> None:
    """600 steps: the share of cutmix has a deviation of 0.02."""
    drawn = [mix.draw(3, 1, step, (32, 48), BOTH) for step in range(600)]
    assert drawn[7:9] == [mix.draw(3, 1, step, (32, 48), BOTH) for step in (7, 8)]
    assert drawn[7:9] != [mix.draw(3, 2, step, (32, 48), BOTH) for step in (7, 8)]
    assert sum(each.box is not None for each in drawn) / 600 == pytest.approx(0.5, abs=0.08)
    for each in drawn:
        assert 0 <= each.weight <= 1
        if each.box is not None:
            top, bottom, left, right = each.box
            assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 48
            assert each.weight == pytest.approx(1 - (bottom - top) * (right - left) / (32 * 48))


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (AugmentSettings(mixup=0.8), {False}),
        (AugmentSettings(cutmix=1.0), {True}),
        (AugmentSettings(mixup=0.8, cutmix=1.0, mix=0.0), {False}),
        (AugmentSettings(), {False}),
    ],
)
def test_what_is_off_is_not_drawn(settings: AugmentSettings, kinds: set[bool]) -> None:
    drawn = [mix.draw(0, 0, step, (8, 8), settings) for step in range(50)]
    assert {each.box is not None for each in drawn} == kinds
    assert all(each == mix.NONE for each in drawn) == (not settings.mixes)


def test_neighbours_are_mixed_as_timm_mixes() -> None:
    """timm pairs the first with the last: a batch of two is paired alike. The labels are timm's, smoothing included."""
    images, labels = torch.rand(2, 8, 8, 3), torch.tensor([1, 4])
    pair = mix.Mix(0.3)
    torch.testing.assert_close(pair.images(images), 0.3 * images + 0.7 * images.flip(0))
    soft = mix.soft_labels(labels, 6, 0.1)
    torch.testing.assert_close(pair.labels(soft), mixup_target(labels, 6, 0.3, 0.1))
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    cut = mix.Mix(1 - 6 / 64, (1, 3, 2, 5))
    mixed = cut.images(images)
    assert torch.equal(mixed[0, 1:3, 2:5], images[1, 1:3, 2:5]) and torch.equal(mixed[0, 3:], images[0, 3:])
    assert (mixed[0] != images[0]).any(-1).sum() == 6


def test_any_even_split_of_a_batch_gives_the_same_pairs() -> None:
    images = torch.rand(8, 4, 4, 3)
    whole = mix.Mix(0.6).images(images)
    for size in (2, 4):
        assert torch.equal(torch.cat([mix.Mix(0.6).images(part) for part in images.split(size)]), whole)
