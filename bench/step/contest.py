"""Speed of a whole training step: contenders on the same images from the same weights.

They run in one process, in turn, round by round, after a check that they compute the same loss and gradient norm. This
system with other settings is not checked, because it may compute something else.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

Result = dict[str, Any]
"""The result of a contest, as the file has it."""

TOLERANCES = {"fp32": {"loss": 1e-5, "grad_norm": 1e-4}, "bf16": {"loss": 2e-2, "grad_norm": 5e-2}}
"""Largest relative differences from this system with which a contender is timed."""

CHECKED = 8
"""Number of images, the first of a batch, on which contenders are compared before they are timed."""

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
    absent: Mapping[str, str] = {}
    """Variants that this machine cannot run, with the reason."""

    def contender(self, name: str) -> tuple[str, Recipe]:
        """Return the implementation of a name, and its recipe."""
        return (OURS, self.variants[name]) if name in self.variants else (name, self.recipe)


def compete(
    contest: Contest, rounds: int, device: torch.device, keep: Callable[[Result], None] = lambda result: None
) -> Result:
    """Check, time and profile the contenders.

    `keep` gets the result so far after each number. A contender that fails is left out, with the reason in `skipped`,
    unless it is this system on the contest's recipe, or another version of it.
    """
    with ExitStack() as processes:
        return _Race(contest, device, keep, processes).run(rounds)


class Expected(NamedTuple):
    """This system's gradients by precision, and the noise that leads other implementations to the same masks."""

    gradients: dict[str, Gradient]
    noise: Tensor


class _Race:
    """A contest while it runs, and its result so far."""

    def __init__(
        self, contest: Contest, device: torch.device, keep: Callable[[Result], None], processes: ExitStack
    ) -> None:
        recipe = contest.recipe
        self.contest, self.device, self.keep, self.processes = contest, device, keep, processes
        self.state, self.images = build(recipe).state_dict(), batch_of(recipe)
        self.ours = Ours(recipe, self.state, self.images, device)
        self.contenders: dict[str, Contender | Version] = {}
        self.seconds: dict[str, list[float]] = {}
        """Seconds per step in each round, by contender."""
        self.slowest = 0.0
        self.result: Result = {
            "images": len(self.images),
            "views": recipe.masking.num_masks,
            "precision": recipe.precision,
            "compiled_blocks": self.ours.compiled,
            "clock": clock()[0],
            "agreement": {},
            "skipped": dict(contest.absent),
            "variants": list(contest.variants),
            "contenders": {},
        }

    def run(self, rounds: int) -> Result:
        """Run the contest, and return its result."""
        contest, ours = self.contest, self.ours
        expected = self._expected() if contest.others else Expected({}, torch.empty(0))
        if ours.compiled:
            self._time_without_compilation()
        self._join(OURS, ours)
        for name in (*contest.others, *contest.variants):
            with self._may_fail(name):
                self._join(name, self._variant(name) if name in contest.variants else self._other(name, expected))
        for another in contest.versions:
            self._join(another.name, self.processes.enter_context(another.start(self.device)))
        self._time(rounds)
        for name in list(self.contenders):
            with self._may_fail(name):
                self.result["contenders"][name]["time_by_kind"] = _kinds(self.contenders[name])
                self.keep(self.result)
        return self.result

    def _expected(self) -> Expected:
        masks = tuple(each[:CHECKED] for each in self.ours.draw())
        precisions = dict.fromkeys(["fp32", str(self.contest.recipe.precision)])
        gradients = {p: checked_gradient(self.ours, masks, p) for p in precisions}
        return Expected(gradients, noise_of(masks[0], self.ours.num_patches))

    def _variant(self, name: str) -> Contender:
        recipe = self.contest.variants[name]
        return Ours(recipe, build(recipe).state_dict(), batch_of(recipe), self.device)

    def _other(self, name: str, expected: Expected) -> Contender:
        """Return another implementation. Raises RuntimeError if it does not compute the same."""
        other = Baseline(name, self.contest.recipe, self.state, self.images, self.device)
        self.result["agreement"][name] = {
            precision: check(name, gradient, checked_gradient(other, (expected.noise,), precision), precision)
            for precision, gradient in expected.gradients.items()
        }
        return other

    def _time_without_compilation(self) -> None:
        """Time a step before compilation, whose first attempt on a machine may take long or fail."""
        try:
            self.ours.timed(1)
            self.result["uncompiled_seconds"] = self.ours.timed(1)
        except torch.OutOfMemoryError as error:  # Compiled blocks keep less for backward.
            self.result["skipped"]["before compilation"] = reason(error)
            self.ours.module.zero_grad()
            _free(error)
        self.keep(self.result)

    def _join(self, name: str, contender: Contender | Version) -> None:
        """Warm up a contender, and take it into the contest."""
        warm = contender.warm_up()
        self.slowest = max(self.slowest, warm)
        self.contenders[name] = contender
        self.seconds[name] = []
        self.result["contenders"][name] = {
            "images_per_s": len(self.images) / warm,
            **_described(contender, self.contest.recipe),
            "seconds_per_step": [],
            "ours_over_this": None,
            "time_by_kind": None,
        }
        self.keep(self.result)

    def _time(self, rounds: int) -> None:
        steps = self.result["steps_per_round"] = max(1, round(ROUND_SECONDS / self.slowest))
        names, optional = list(self.contenders), {*self.contest.others, *self.contest.variants}
        for number in track(range(rounds), "step", rounds, "rounds"):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name not in self.contenders:
                    continue
                with self._may_fail(name, is_needed=name not in optional):
                    # The first step of a turn gets the memory that the contender before has given back; it is not
                    # counted.
                    self.contenders[name].timed(1)
                    self.seconds[name].append(self.contenders[name].timed(steps))
            for name in self.contenders:
                self._count(name)
            self.keep(self.result)

    def _count(self, name: str) -> None:
        """Write the times of a contender so far into its row."""
        times = self.seconds[name]
        self.result["contenders"][name] |= {
            "images_per_s": len(self.images) / statistics.median(times),
            "seconds_per_step": list(times),
            # Pair by round, so that a temporary slowdown of the machine affects both.
            "ours_over_this": _spread([t / o for t, o in zip(times, self.seconds[OURS])]),
        }

    @contextmanager
    def _may_fail(self, name: str, is_needed: bool = False) -> Iterator[None]:
        """Take a contender that fails out of the contest, with the reason; its row keeps the numbers it has."""
        try:
            yield
        except Exception as error:  # Memory, a compiler, a package or a kernel: each costs this contender only.
            if is_needed:
                raise
            self.contenders.pop(name, None)
            self.result["skipped"][name] = reason(error)
            self.keep(self.result)
            _free(error)


def checked_gradient(contender: Contender, masks: Sequence[Tensor], precision: str) -> Gradient:
    """Return loss and gradient norm on the first CHECKED images, whose activations fit into any memory."""
    images = contender.images
    contender.images = images[:CHECKED]
    try:
        return contender.gradient(masks, precision)
    finally:
        contender.images = images


def _free(error: Exception) -> None:
    """Free the memory that the frames of an error hold, for the contenders that follow."""
    clear_frames(error.__traceback__)
    gc.collect()
    torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Return the first line of an error as the reason for a number that is missing."""
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, UserError):
        return line
    return f"{'out of memory' if isinstance(error, torch.OutOfMemoryError) else type(error).__name__}: {line}"


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
    """Return what a contender computes. Another version has the recipe of the contest."""
    if isinstance(contender, Version):
        own, attention = recipe, None
    else:
        own = contender.recipe
        attention = contender.attention if isinstance(contender, Baseline) else own.model.attention
    return {"precision": own.precision, "attention": attention, "flops_per_step": step_flops(own)}


def _kinds(contender: Contender | Version) -> dict[str, float]:
    return contender.kinds() if isinstance(contender, Version) else time_by_kind(contender)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
