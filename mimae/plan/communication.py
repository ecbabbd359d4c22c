"""Bytes that a rank sends in an optimizer step, by engine, and the seconds that nothing hides (docs/scaling.md).

Rings: of n bytes an all-reduce sends 2 n (W-1)/W, an all-gather and a reduce-scatter n (W-1)/W. Latency is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from mimae.plan.gpus import GPU
from mimae.plan.memory import FP32, Layout, Parameters

if TYPE_CHECKING:
    from mimae.config import Recipe

LINKS = 0.8
"""Assumed share of a link's nominal rate that collectives reach."""
OVERLAP = 0.8
"""Assumed share of computing behind which communication can hide: the first and the last of it stand alone."""
HOST = 20e9
"""Assumed bytes a second of one GPU's share of the host: over PCIe, and through memory as its AdamW steps."""

Window = Literal["forward", "backward", "none"]


class Traffic(NamedTuple):
    """What a rank sends in an optimizer step."""

    what: str
    bytes: float
    seconds: float
    window: Window
    """The computing that it runs beside."""
    across: bool = False
    """Over network cards alone, while the links inside of nodes are free for the rest."""


def traffic(recipe: Recipe, layout: Layout, gpu: GPU, per_node: int, count: Parameters) -> list[Traffic]:
    """All of an optimizer step, on nodes of `per_node` GPUs."""
    n, W, A = count.total * FP32, layout.ranks, recipe.schedule.accumulate
    every = _bus(gpu, W, per_node, together=1)
    found = [_latents(recipe, W, every)]
    if layout.kind == "ddp":
        found.append(_sent("gradients, all-reduce", 2 * n, W, every, "backward"))
    elif layout.kind in ("zero1", "zero2"):
        # DeepSpeed all-reduces buckets of these stages too, and waits for each.
        times = 1 if layout.kind == "zero1" else A
        found.append(_sent("gradients, all-reduce", 2 * n * times, W, every, "none"))
        found.append(_sent("weights, all-gather", n, W, every, "none"))
    else:
        inner = _bus(gpu, layout.shards, per_node, together=1)
        found.append(_sent("weights, all-gather", n * A, layout.shards, inner, "forward"))
        found.append(_sent("weights again, all-gather", n * A, layout.shards, inner, "backward"))
        found.append(_sent("gradients, reduce-scatter", n * A, layout.shards, inner, "backward"))
    if layout.replicas > 1:
        across = _bus(gpu, W, per_node, together=min(layout.shards, per_node))
        shares = _sent("shares, all-reduce", 2 * n / layout.shards, layout.replicas, across, "backward")
        found.append(shares._replace(across=layout.shards <= per_node))
    if layout.offload == "cpu":
        # Gradients down and weights up; AdamW reads four numbers of a parameter and writes three.
        moved = n / layout.shards * (1 + 2 * A)
        stepped = n / layout.shards * 7
        found.append(Traffic("to the host and back, and its AdamW", moved, (moved + stepped) / HOST, "none"))
    return [each for each in found if each.bytes]


def exposed(found: Iterable[Traffic], forward: float, backward: float, accumulate: int, kind: str) -> float:
    """Seconds of a step's communication that computing does not hide, of so many seconds of forward and backward."""
    # DDP reduces beside the last micro-batch's backward alone.
    room = {"forward": forward, "backward": backward / (accumulate if kind == "ddp" else 1), "none": 0.0}
    asked = {(window, across): 0.0 for window in room for across in (False, True)}
    for each in found:
        asked[each.window, each.across] += each.seconds
    longest = {window: max(asked[window, False], asked[window, True]) for window in room}
    return sum(max(0.0, longest[window] - OVERLAP * room[window]) for window in room)


def _bus(gpu: GPU, ranks: int, per_node: int, together: int) -> float:
    """Bytes a second that each rank of a group sends: inside a node its link; across nodes the node's network cards
    carry each ring once, shared by as many groups as run `together`."""
    if ranks <= per_node:
        return LINKS * gpu.link * 1e9
    return LINKS * min(gpu.link, gpu.network * per_node / together) * 1e9


def _sent(what: str, bytes: float, ranks: int, rate: float, window: Window) -> Traffic:
    sent = bytes * (ranks - 1) / ranks
    return Traffic(what, sent, sent / rate, window)


def _latents(recipe: Recipe, ranks: int, rate: float) -> Traffic:
    """Latents and log-sum-exps of all ranks for InfoNCE; moments, and V's sums, for CLUB. Forward waits for them."""
    objective, N, D = recipe.objective, recipe.masking.num_masks, recipe.model.width
    micro_batch = recipe.schedule.batch_size // recipe.schedule.accumulate
    gathered = micro_batch * N * (D + N) if objective.max_mi > 0 else 0
    gathered += ranks * 2 * D + 2 * (2 * D + 1) if objective.min_mi > 0 else 0
    bytes = gathered * FP32 * recipe.schedule.accumulate
    return _sent("latents, log-sum-exps, moments", bytes, ranks, rate, "none")
