"""Progressive resolution: the size of training images, a pure function of the step. This module imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from mimae.optim.settings import ScheduleSettings

Size = tuple[int, int]
"""Height and width of an image in pixels."""


class Stage(NamedTuple):
    """Consecutive optimizer steps with training images of one size."""

    size_hw: Size
    first: int
    """The first step of the stage; steps count from 0."""
    end: int
    """The step after the last one of the stage."""


def sizes(schedule: ScheduleSettings, size_hw: Size) -> list[Size]:
    """Return the sizes of the training images in the order of the stages; `size_hw` is that of `data.image_size`."""
    return [_pair(side) for side, _ in schedule.resolution] or [size_hw]


def stages(schedule: ScheduleSettings, size_hw: Size, steps: int) -> list[Stage]:
    """Return the stages of a run of `steps` steps, of which the last has at least one step.

    Another stage that is too short for a step is left out. An extended run has one stage: it was extended in its last
    stage (`train.resume` refuses any other), and the shares of its first length do not apply to the new one.
    """
    found_sizes, found_shares = zip(*shares(schedule, size_hw), strict=True)
    ends = [*(min(round(steps * share), steps - 1) for share in accumulate(found_shares[:-1])), steps]
    found = map(Stage, found_sizes, [0, *ends], ends)
    return [stage for stage in found if stage.first < stage.end]


def shares(schedule: ScheduleSettings, size_hw: Size) -> list[tuple[Size, float]]:
    """Return the sizes of the training images, each with its share of the steps; those of an extended run are its
    further steps."""
    if not schedule.resolution or schedule.extended:
        return [(size_hw, 1.0)]
    return [(_pair(side), share) for side, share in schedule.resolution]


def work(found: list[Stage], step: int, cost: Callable[[Size], float]) -> float:
    """Return the work of the first `step` steps of a run, if an image of a size costs `cost`."""
    return sum((min(step, stage.end) - stage.first) * cost(stage.size_hw) for stage in found if stage.first < step)


def stage_at(schedule: ScheduleSettings, size_hw: Size, steps: int, step: int) -> Stage:
    """Return the stage of optimizer step `step` (from 0) in a run of `steps` steps."""
    found = stages(schedule, size_hw, steps)
    return next((stage for stage in found if step < stage.end), found[-1])


def in_words(size_hw: Size) -> str:
    """Return a size for people: `24 px` or `24 x 32 px`."""
    height, width = size_hw
    return f"{height} px" if height == width else f"{height} x {width} px"


def _pair(side: int | Size) -> Size:
    return (side, side) if isinstance(side, int) else side
