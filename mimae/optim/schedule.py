"""The length of a run, and the learning rate of each step."""

from __future__ import annotations

import math

from mimae.optim.settings import ScheduleSettings


def total_steps(schedule: ScheduleSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = schedule.epochs * steps_per_epoch
    return steps if schedule.max_steps is None else min(steps, schedule.max_steps)


def schedule_factor(schedule: ScheduleSettings, step: int, steps_per_epoch: int, peak: float) -> float:
    """Return the factor of the peak learning rates at optimizer step `step` (from 0): linear warm-up, then the shape.

    `peak` is the scaled value of learning_rate. The floor is relative to it, so that the rate of each group ends at the
    same share of its own peak.
    """
    total = total_steps(schedule, steps_per_epoch)
    warmup = schedule.warmup_epochs * steps_per_epoch
    warmup = min(warmup if schedule.warmup_from_zero else round(warmup), total)
    if step < warmup:
        return (step if schedule.warmup_from_zero else step + 1) / warmup
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "steps":
        return math.prod(schedule.drop_factor for at in schedule.drop_epochs if step >= round(at * steps_per_epoch))
    done = (step - warmup) / max(total - warmup, 1)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.shape == "cosine" else 1 - done
    return left + (1 - left) * schedule.floor / peak
