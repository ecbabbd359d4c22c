"""Speed of a whole training step: contenders on the same images from the same weights.

They run in one process, in turn, round by round, after a check that they compute the same loss and gradient norm. This
system with other settings is not checked, because it may compute something else.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimae.bench.baselines.peers import noise_of
from mimae.bench.step.contenders import OURS, Baseline, Contender, Gradient, Ours, batch_of
from mimae.bench.step.meters import clock
from mimae.bench.step.operators import time_by_kind
from mimae.bench.step.version import Version, name_of
from mimae.config.recipe import Recipe
from mimae.errors import UserError
from mimae.model.mimae import build
from mimae.outside.progress import track
from mimae.plan.flops import step_flops

TOLERANCES = {"fp32": {"loss": 1e-5, "grad_norm": 1e-4}, "bf16": {"loss": 2e-2, "grad_norm": 5e-2}}
"""Largest relative differences from this system with which a contender is timed."""

ROUND_SECONDS = 2.0
"""Approximate seconds of a contender's turn in a round; a turn has at least one step."""


def check(name: str, expected: Gradient, found: Gradient, precision: str) -> dict[str, float]:
    """Return the relative differences of a contender from this system. Raises RuntimeError beyond TOLERANCES."""
    errors = {key: abs(found[key] - expected[key]) / abs(expected[key]) for key in expected}
    for key, error in errors.items():
        if not error <= TOLERANCES[precision][key]:
            raise RuntimeError(
                f"{name} and {OURS} do not compute the same in {precision}: "
                f"{key} {found[key]} and {expected[key]}, {error:.1e} apart"
            )
    return errors


class Another(NamedTuple):
    """Another version of this system: its checkout, and what it has to load to have the contest's recipe."""

    checkout: Path
    recipe: str | None
    overrides: Sequence[str]

    @property
    def name(self) -> str:
        """Name of the contender."""
        return name_of(self.checkout)

    def start(self, device: torch.device) -> Version:
        """Start its process."""
        return Version(self.checkout, self.recipe, self.overrides, device)


class Contest(NamedTuple):
    """The compared contenders.

    They are this system on a recipe, `others` on the same, this system on other recipes, by name, and other versions of
    this system.
    """

    recipe: Recipe
    others: Sequence[str]
    variants: Mapping[str, Recipe]
    versions: Sequence[Another] = ()

    def contender(self, name: str) -> tuple[str, Recipe]:
        """Return the implementation of a name, and its recipe."""
        return (OURS, self.variants[name]) if name in self.variants else (name, self.recipe)


def compete(contest: Contest, rounds: int, device: torch.device) -> dict[str, Any]:
    """Check, time and profile the contenders.

    A contender that runs out of memory or is not installed is left out, with the reason, unless it is this system on
    the contest's recipe, or another version of it.
    """
    with ExitStack() as processes:
        return _compete(contest, rounds, device, processes)


def _compete(contest: Contest, rounds: int, device: torch.device, processes: ExitStack) -> dict[str, Any]:
    recipe = contest.recipe
    state, images = build(recipe).state_dict(), batch_of(recipe)
    ours = Ours(recipe, state, images, device)
    contenders: dict[str, Contender | Version] = {OURS: ours}
    if contest.others:
        visible, targets = ours.draw()
        noise = noise_of(visible, ours.num_patches)
        expected = {p: ours.gradient((visible, targets), p) for p in dict.fromkeys(["fp32", recipe.precision])}
    slowest = ours.warm_up()
    agreement: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in (*contest.others, *contest.variants):
        try:
            if name in contest.variants:
                variant = contest.variants[name]
                other: Contender = Ours(variant, build(variant).state_dict(), batch_of(variant), device)
            else:
                other = Baseline(name, recipe, state, images, device)
                agreement[name] = {
                    p: check(name, gradient, other.gradient((noise,), p), p) for p, gradient in expected.items()
                }
            slowest = max(slowest, other.warm_up())
            contenders[name] = other
        except torch.OutOfMemoryError as error:
            skipped[name] = f"out of memory: {str(error).splitlines()[0]}"
        except UserError as error:  # The package is not installed.
            skipped[name] = str(error)
    for another in contest.versions:
        version = processes.enter_context(another.start(device))
        slowest = max(slowest, version.warm_up())
        contenders[another.name] = version

    steps = max(1, round(ROUND_SECONDS / slowest))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in track(range(rounds), "step", rounds, "rounds"):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            # The first step of a turn gets the memory that the contender before has given back; it is not counted.
            contenders[name].timed(1)
            seconds[name].append(contenders[name].timed(steps))
    return {
        "images": len(images),
        "views": recipe.masking.num_masks,
        "precision": recipe.precision,
        "compiled_blocks": ours.compiled,
        "steps_per_round": steps,
        "clock": clock()[0],
        "agreement": agreement,
        "skipped": skipped,
        "variants": list(contest.variants),
        "contenders": {
            name: {
                "images_per_s": len(images) / statistics.median(times),
                **_described(contenders[name], recipe),
                "seconds_per_step": times,
                # Pair by round, so that a temporary slowdown of the machine affects both.
                "ours_over_this": _spread([t / o for t, o in zip(times, seconds[OURS])]),
            }
            for name, times in seconds.items()
        },
    }


def untimed(contest: Contest) -> dict[str, Any]:
    """Return the contenders without their speed, for a count of their memory. Baselines have torch's attention."""
    recipes = {OURS: contest.recipe, **contest.variants}
    names = [OURS, *contest.others, *contest.variants, *(another.name for another in contest.versions)]
    return {
        "images": contest.recipe.schedule.batch_size,
        "views": contest.recipe.masking.num_masks,
        "precision": contest.recipe.precision,
        "compiled_blocks": False,
        "variants": list(contest.variants),
        "contenders": {
            name: {"attention": recipes[name].model.attention if name in recipes else "sdpa"} for name in names
        },
    }


def _described(contender: Contender | Version, recipe: Recipe) -> dict[str, Any]:
    """Return what a contender computes, and its profile. Another version has the recipe of the contest."""
    if isinstance(contender, Version):
        own, attention, kinds = recipe, None, contender.kinds()
    else:
        own, kinds = contender.recipe, time_by_kind(contender)
        attention = contender.attention if isinstance(contender, Baseline) else own.model.attention
    return {
        "precision": own.precision,
        "attention": attention,
        "flops_per_step": step_flops(own),
        "time_by_kind": kinds,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
