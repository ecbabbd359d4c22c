"""Choice of the backend for `model.attention=auto`: the fastest one for a step's shapes, measured on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from mimae.model.attention import BACKENDS, PACKED, obstacle
from mimae.model.geometry import geometry

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

CANDIDATES = {"cpu": ("sdpa", "plain"), "cuda": ("sdpa", "cudnn", "xformers")}
"""Backends that are measured; the first is the default. Two backends are not measured on a GPU: flex, which is compiled
for each shape, and plain, which writes all attention weights to memory. Both can be set by name."""

SECONDS = 0.3
"""Time budget of all measurements together, in seconds. Each backend runs at least twice on each shape."""

SCORES = {"cpu": 2**20, "cuda": 2**30}
"""Number of attention weights in a measured call. A call with more is measured on fewer sequences."""

MARGIN = 0.9
"""Another backend replaces the default only if it takes less than this share of the default's time."""


class Call(NamedTuple):
    """The shapes of a call of attention."""

    sequences: int
    heads: int
    queries: int
    keys: int
    width: int
    """Width of a head."""
    times: int
    """Number of such calls in a forward."""

    def shortened(self, scores: int) -> Call:
        """Return the call with fewer sequences if it has more than `scores` attention weights, else the same call."""
        fitting = max(1, scores // (self.heads * self.queries * self.keys))
        return self._replace(sequences=min(self.sequences, fitting))


def calls(recipe: Recipe, ranks: int) -> list[Call]:
    """Return the calls of attention in the forward of one rank's micro-batch."""
    model, decoder, sizes = recipe.model, recipe.decoder, geometry(recipe)
    sequences = max(1, recipe.schedule.batch_size // (recipe.schedule.accumulate * ranks)) * sizes.views
    shown, targets = 1 + sizes.visible, sizes.targets
    every, width = shown + targets, decoder.width // decoder.heads
    encoder = Call(sequences, model.heads, shown, shown, model.width // model.heads, model.depth)
    if decoder.attention == "cross":
        return [encoder, Call(sequences, decoder.heads, targets, shown, width, decoder.depth)]
    last = Call(sequences, decoder.heads, targets, every, width, 1)
    return [encoder, last._replace(queries=every, times=decoder.depth - 1), last]


def choose(
    made: Sequence[Call], device: torch.device, dtype: torch.dtype, candidates: Sequence[str] | None = None
) -> tuple[str, str]:
    """Return the backend for the calls of a step, and the reason for the choice as text.

    `candidates` are by default those of CANDIDATES; the first one is the default, and runs everywhere.
    """
    first, *others = candidates or CANDIDATES[device.type]
    if not made:
        return first, "the default"
    widths = {call.width for call in made}
    names = [first, *(name for name in others if obstacle(name, device, dtype, widths) is None)]
    if len(names) == 1:
        return first, "the only one here"
    seconds = measured(names, made, device, dtype)
    fastest = min(names, key=lambda name: seconds[name])
    name = fastest if seconds[fastest] < MARGIN * seconds[first] else first
    times = ", ".join(
        f"{name} {1e3 * taken:.3g}" if math.isfinite(taken) else f"{name} failed" for name, taken in seconds.items()
    )
    return name, f"measured here (ms of a forward and backward: {times})"


def measured(
    names: Sequence[str], made: Sequence[Call], device: torch.device, dtype: torch.dtype
) -> Mapping[str, float]:
    """Return the seconds that each backend takes for all calls of a forward and its backward: best of its runs.

    They are infinite for a backend that fails on one of the calls, unless it is the first, whose error is raised.
    """
    asked = [call for call in made if call.times]
    short = [call.shortened(SCORES[device.type]) for call in asked]
    working = [name for name in names if name == names[0] or _works(name, short, device, dtype)]
    totals = dict.fromkeys(names, math.inf) | dict.fromkeys(working, 0.0)
    for call, shorter in zip(asked, short, strict=True):
        best, end, turns = dict.fromkeys(working, math.inf), time.perf_counter() + SECONDS / len(asked), 0
        while turns < 2 or time.perf_counter() < end:
            turns += 1
            for name in working:
                best[name] = min(best[name], _seconds(name, shorter, device, dtype))
        for name in working:
            totals[name] += call.times * best[name] * call.sequences / shorter.sequences
    return totals


def _works(name: str, made: Sequence[Call], device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a backend computes all calls: a third-party one may fail in any way on their shapes."""
    try:
        for call in made:
            _seconds(name, call, device, dtype)
    except Exception:
        return False
    return True


def _seconds(name: str, call: Call, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of one forward and backward, with q, k and v packed in one tensor as in a block."""
    size = (call.sequences, call.keys, 3 * call.heads * call.width)
    # Random values: matrix products of zeros take less power, and a GPU then runs faster than in training.
    random = torch.Generator(device).manual_seed(0)
    packed = torch.randn(size, generator=random, device=device, dtype=dtype).requires_grad_()
    _wait(device)
    start = time.perf_counter()
    if call.queries == call.keys and name in PACKED:
        out = PACKED[name](packed, call.heads)
    else:
        q, k, v = (x.unflatten(2, (call.heads, -1)).transpose(1, 2) for x in packed.chunk(3, -1))
        out = BACKENDS[name](q[:, :, -call.queries :], k, v).transpose(1, 2).flatten(2)
    out.backward(out.detach())
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
