"""Advice that makes a step faster or smaller, with an upper bound of its savings, the most valuable first."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mimae.config.recipe import Recipe
from mimae.plan.flops import image_flops
from mimae.report.profile.phases import COMMUNICATION, IDLE
from mimae.report.profile.profile import Profile, is_compiled, matrix_rate

WORTH = 0.02
"""Smallest share of the step's time for which advice is given."""


class Advice(NamedTuple):
    """A change of settings, and the largest share of the step's time that it can save."""

    saves: float
    text: str


def advise(found: Profile) -> list[Advice]:
    """Return the advice that applies to a profile, the most valuable first."""
    every = (_data, _precision, _decoder, _idle, _communication, _optimizer, _waits)
    told = [advice for rule in every if (advice := rule(found)) is not None and advice.saves >= WORTH]
    return sorted(told, reverse=True)


def _share(found: Profile, *names: str) -> float:
    total = sum(phase.seconds for phase in found.phases.values())
    return sum(found.phases[name].seconds for name in names if name in found.phases) / total


def _data(found: Profile) -> Advice | None:
    share, data = _share(found, "data wait"), found.recipe.data
    if data.workers == 0:
        return Advice(share, "the training process makes the batches itself: data.workers=null starts worker processes")
    return Advice(share, "the step waits for data: mimae bench data PATH compares loaders, data.cache keeps images")


def _precision(found: Profile) -> Advice | None:
    if found.recipe.precision == "bf16" or found.peak is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with_bf16 = matrix_rate(found.recipe.model_copy(update={"precision": "bf16"}), device)
    in_fp32 = matrix_rate(found.recipe, device)
    if with_bf16 < 1.2 * in_fp32:
        return None
    at_rate = found.flops / in_fp32 / found.seconds
    text = f"precision=bf16: products of large matrices are {with_bf16 / in_fp32:.1f} times as fast here"
    return Advice(min(at_rate, 1.0) * (1 - in_fp32 / with_bf16), text)


def _decoder(found: Profile) -> Advice | None:
    recipe = found.recipe
    if not isinstance(recipe, Recipe) or recipe.masking.num_masks < 2 or recipe.decoder.predict == "next_view":
        return None
    names = [name for name in found.phases if name.split(".")[0] == "decoder"]
    smaller = recipe.model_copy(update={"decoder": recipe.decoder.model_copy(update={"predict": "next_view"})})
    text = (
        f"decoder.predict=next_view: the decoder takes {_share(found, *names):.0%} of the step, and would have fewer "
        "tokens; this changes the training task, see docs/controls.md"
    )
    return Advice(1 - image_flops(smaller) / image_flops(recipe), text)


def _idle(found: Profile) -> Advice | None:
    if IDLE not in found.phases:
        return None
    way = "compile=graphs launches all kernels at once" if is_compiled(found) else "compile=on fuses small kernels"
    return Advice(_share(found, IDLE), f"the device is idle between kernels: {way}; larger batches hide launches")


def _communication(found: Profile) -> Advice | None:
    return Advice(_share(found, COMMUNICATION), "gradient communication: docs/scaling.md describes how to hide it")


def _optimizer(found: Profile) -> Advice | None:
    share, accumulate = _share(found, "optimizer"), found.recipe.schedule.accumulate
    # With twice the images its share of the time is halved.
    return Advice(share / 2, f"the optimizer takes {share:.0%}: use twice the images (now accumulate={accumulate})")


def _waits(found: Profile) -> Advice | None:
    names = {name: phase.waits for name, phase in found.phases.items() if phase.waits and IDLE in found.phases}
    if not names:
        return None
    told = ", ".join(f"{name} ({count:.0f})" for name, count in names.items())
    return Advice(WORTH, f"the host waits for the device in {told}: each wait empties the queue of kernels")
