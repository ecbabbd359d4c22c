"""The length of a run, and the learning rate of each step."""

from __future__ import annotations

import math

from mimae.config.layers import text
from mimae.optim.settings import ScheduleSettings


def total_steps(schedule: ScheduleSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = schedule.epochs * steps_per_epoch
    return steps if schedule.max_steps is None else min(steps, schedule.max_steps)


EXTENDABLE = ("epochs", "max_steps", "warmup_epochs", "shape", "floor", "drop_epochs", "drop_factor")
"""Keys that may change when a run is extended."""


def schedule_factor(schedule: ScheduleSettings, step: int, steps_per_epoch: int, peak: float) -> float:
    """Return the factor of the peak learning rates at optimizer step `step` (from 0): linear warm-up, then the shape.

    The schedule of an extended run begins at the step of the extension, with the factor that it had there. `peak` is
    the scaled value of learning_rate. The floor is relative to it, so that the rate of each group ends at the same
    share of its own peak. Raises ValueError for a step before the extension, whose schedule is not known.
    """
    first, begin = start(schedule)
    if step < first:
        raise ValueError(f"step {step} is before step {first}, at which the schedule begins")
    total, warmup, taken = total_steps(schedule, steps_per_epoch), _warmup(schedule, steps_per_epoch), step - first
    if taken < warmup:
        return begin + (1 - begin) * (taken if schedule.warmup_from_zero else taken + 1) / warmup
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "steps":
        return math.prod(schedule.drop_factor for at in schedule.drop_epochs if step >= round(at * steps_per_epoch))
    done = (taken - warmup) / max(total - first - warmup, 1)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.shape == "cosine" else 1 - done
    return left + (1 - left) * schedule.floor / peak


def extended(
    old: ScheduleSettings, new: ScheduleSettings, step: int, steps_per_epoch: int, peak: float
) -> ScheduleSettings:
    """Return `new` as the schedule of a run that has taken `step` steps of `old`.

    The learning rate rises from where it is to its peak in a warm-up, and then goes as the new shape says. Where the
    steps so far are those of a run that had `new` from the start, as with a constant shape or inside the warm-up, it
    goes on as in that run.
    """
    changed = [key for key in EXTENDABLE if getattr(old, key) != getattr(new, key)]
    begun = start(old)
    is_warming_up = step < begun[0] + _warmup(old, steps_per_epoch) and "warmup_epochs" not in changed
    has_no_end = new.shape in ("constant", "steps") and {"epochs", "max_steps"}.issuperset(changed)
    # Of a run with several resolutions, the steps before an extension had other sizes: see `resolution.stages`.
    if new.resolution or not (is_warming_up or has_no_end):
        begun = step, schedule_factor(old, step, steps_per_epoch, peak)
    before = " ".join(f"schedule.{key}={text(getattr(old, key))}" for key in changed)
    return new.model_copy(update={"extended": (*old.extended, (*begun, f"{before} until step {step}"))})


def start(schedule: ScheduleSettings) -> tuple[int, float]:
    """Return the step at which a schedule begins, and the share of the peak that its warm-up rises from.

    Both are 0 unless the run was extended.
    """
    return schedule.extended[-1][:2] if schedule.extended else (0, 0.0)


def _warmup(schedule: ScheduleSettings, steps_per_epoch: int) -> float:
    """Return the steps of the warm-up."""
    steps = schedule.warmup_epochs * steps_per_epoch
    left = total_steps(schedule, steps_per_epoch) - start(schedule)[0]
    return min(steps if schedule.warmup_from_zero else round(steps), left)
