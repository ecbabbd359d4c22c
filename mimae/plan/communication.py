"""Traffic of a rank in an optimizer step, by engine, and the seconds that computing does not hide (docs/scaling.md).

Collectives run in rings. For n bytes an all-reduce sends 2 n (W-1)/W, an all-gather and a reduce-scatter n (W-1)/W. A
call also waits for its hops: all W-1 of the ring; for an all-reduce those of a tree, up and down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from mimae.engines.zero import LIVE, bucket
from mimae.model.geometry import geometry
from mimae.objective.costs import FP32, MicroBatch, Sent
from mimae.objective.loss import losses
from mimae.objective.terms import active
from mimae.plan.flops import decoder_flops, encoder_flops
from mimae.plan.gpus import GPU, GPUS
from mimae.plan.memory import Layout, Parameters, number_bytes, parameters

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

LINKS = 0.8
"""Assumed share of a link's nominal rate that collectives reach."""
OVERLAP = 0.8
"""Assumed share of computing that can hide communication. Its beginning and its end cannot."""
HOST = 20e9
"""Assumed bytes per second of one GPU's share of the host: over PCIe, and through memory in the host's AdamW."""
DISK = 6e9
"""Assumed bytes per second of a node's NVMe drive, which its GPUs share."""
HOP_INSIDE, HOP_ACROSS = 3e-6, 15e-6
"""Assumed seconds of a hop from one GPU to the next: inside a node, and over its network cards."""
DDP_BUCKET = 25 * 2**20
"""Bytes of gradients in a bucket of DDP (its default). The first bucket has 1 MiB."""

LATENTS, SCORES, SUMS = OF_OBJECTIVE = "latents, moments", "log-sum-exps", "sums and losses"
"""Names of the traffic that the losses need from all ranks."""
_LABELS: dict[tuple[Literal["all-gather", "all-reduce"], bool], str] = {
    ("all-gather", True): LATENTS,
    ("all-gather", False): SCORES,
    ("all-reduce", False): SUMS,
}
"""Names of the collectives of the objective's terms. Keys: the kind, and True if it runs while the decoder computes."""

Phase = Literal["forward", "backward", "optimizer"]
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "host"]


class Traffic(NamedTuple):
    """Traffic of a rank in an optimizer step for one purpose."""

    what: str
    kind: Kind
    ranks: int
    """Number of ranks in the group."""
    calls: int
    bytes: float
    seconds: float
    phase: Phase
    beside: bool
    """True if computing of this phase can hide it; otherwise the phase waits."""
    across: bool = False
    """True if it only uses network cards, and leaves the links inside nodes free for other traffic."""

    @property
    def label(self) -> str:
        return self.what if self.kind == "host" else f"{self.what}, {self.kind}"


class _Group(NamedTuple):
    """A group of ranks that communicate, and their placement on nodes."""

    ranks: int
    nodes: int
    rate: float
    """Bytes per second that each rank sends."""

    def latency(self, kind: Kind) -> float:
        """Seconds of a call with a message of negligible size."""
        if kind == "all-reduce":
            inside, across = 2.0 * (-(-self.ranks // self.nodes) - 1), 2 * math.log2(self.nodes)
        else:
            inside, across = self.ranks - self.nodes, self.nodes - 1
        return inside * HOP_INSIDE + across * HOP_ACROSS


def traffic(recipe: Recipe, layout: Layout, gpu: GPU, per_node: int, count: Parameters) -> list[Traffic]:
    """Return the traffic of an optimizer step on nodes of `per_node` GPUs.

    ZeRO-3 is assumed to gather by blocks, as fsdp does.
    """
    n, W, A = count.total * FP32, layout.ranks, recipe.schedule.accumulate
    every = _neighbours(gpu, W, per_node)
    found = _of_objective(recipe, every)
    buckets = -(-count.total // bucket(count.block))
    if layout.kind == "ddp":
        calls = 1 + math.ceil(max(n - 2**20, 0) / DDP_BUCKET)
        found.append(_sent("gradients", "all-reduce", n, calls, every, "backward", True))
    elif layout.kind in ("zero1", "zero2"):
        # In these stages too DeepSpeed all-reduces buckets, and waits for each of them.
        times = 1 if layout.kind == "zero1" else A
        found.append(_sent("gradients", "all-reduce", n * times, buckets * times, every, "backward", False))
        found.append(_sent("weights", "all-gather", n, buckets, every, "optimizer", False))
    elif layout.kind in ("fsdp", "zero3"):
        inner, blocks = _neighbours(gpu, layout.shards, per_node), recipe.model.depth + recipe.decoder.depth
        # fsdp keeps the parameters outside the blocks for backward, ZeRO-3 the later half of its buffer.
        kept = count.root if layout.kind == "fsdp" else LIVE * bucket(count.block) // 2
        again = max(0, count.total - kept) * FP32
        found.append(_sent("weights", "all-gather", n * A, (blocks + 1) * A, inner, "forward", True))
        found.append(_sent("weights again", "all-gather", again * A, blocks * A, inner, "backward", True))
        found.append(_sent("gradients", "reduce-scatter", n * A, (blocks + 1) * A, inner, "backward", True))
        norms = 1 + len({term.group for term in active(recipe.objective)} - {None})
        found.append(_sent("norms", "all-reduce", norms * FP32, 1, inner, "optimizer", False))
        if layout.replicas > 1:
            group = _replicas(gpu, layout, per_node)
            shares = _sent("shares", "all-reduce", n / layout.shards, blocks + 1, group, "backward", True)
            found.append(shares._replace(across=layout.shards <= per_node))
    else:
        raise ValueError(f"the planner does not know what engine.kind={layout.kind} sends")
    if layout.offload != "none":
        # Gradients go to the host and weights come back. AdamW reads four numbers for a parameter and writes three.
        moved = n / layout.shards * (1 + 2 * A)
        stepped = n / layout.shards * 7
        host = "to the host and back, and its AdamW"
        found.append(Traffic(host, "host", 1, 1, moved, (moved + stepped) / HOST, "optimizer", False))
    if layout.offload == "nvme":
        # Gradients are written and read once, and so are weights and both moments.
        files = n / layout.shards * 8
        seconds = files * min(W, per_node) / DISK
        found.append(Traffic("to the node's disk and back", "host", 1, 1, files, seconds, "optimizer", False))
    return [each for each in found if each.bytes]


def bytes_sent(recipe: Recipe, ranks: int, device: torch.device) -> int:
    """Return the bytes that a rank of a run sends to others in an optimizer step (with gloo on the CPU)."""
    engine = recipe.engine
    layout = Layout(engine.kind, ranks, engine.replicas, engine.offload)
    # The choice of the GPU and its links does not matter here.
    found = traffic(recipe, layout, GPUS["h100"], ranks, parameters(recipe))
    # gloo's reduce-scatter is an all-reduce, of which each rank takes its part.
    scatter = 2 if device.type == "cpu" else 1
    return round(sum(e.bytes * (scatter if e.kind == "reduce-scatter" else 1) for e in found if e.kind != "host"))


def exposed(found: Sequence[Traffic], recipe: Recipe, layout: Layout, forward: float, backward: float) -> float:
    """Return the seconds of a step's communication that `forward` and `backward` seconds of computing do not hide."""
    # DDP's reductions overlap only with the backward of the last micro-batch.
    last = recipe.schedule.accumulate if layout.kind == "ddp" else 1
    room: dict[Phase, float] = {"forward": forward, "backward": backward / last}
    waits = sum(each.seconds for each in found if not each.beside)
    # Latents are available when the encoder is done.
    latents = sum(each.seconds for each in found if each.what == LATENTS)
    of_decoder = decoder_flops(recipe) / (encoder_flops(recipe) + decoder_flops(recipe))
    late = max(0.0, latents - OVERLAP * forward * of_decoder)
    waits += late
    room["forward"] += late / OVERLAP
    for phase, seconds in room.items():
        asked = {False: 0.0, True: 0.0}
        for each in found:
            asked[each.across] += each.seconds if each.beside and each.phase == phase else 0.0
        waits += max(0.0, max(asked.values()) - OVERLAP * seconds)
    return waits


def _bus(gpu: GPU, ranks: int, per_node: int, together: int) -> float:
    """Return the bytes per second that each rank of a group sends.

    Inside a node this is the rate of its link. Across nodes the network cards of a node carry each ring once, and
    `together` groups share them.
    """
    if ranks <= per_node:
        return LINKS * gpu.link * 1e9
    return LINKS * min(gpu.link, gpu.network * per_node / together) * 1e9


def _neighbours(gpu: GPU, ranks: int, per_node: int) -> _Group:
    """Return a group of consecutive ranks."""
    return _Group(ranks, -(-ranks // per_node), _bus(gpu, ranks, per_node, together=1))


def _replicas(gpu: GPU, layout: Layout, per_node: int) -> _Group:
    """Return the group of ranks with equal shares, one of each replica."""
    rate = _bus(gpu, layout.ranks, per_node, together=min(layout.shards, per_node))
    return _Group(layout.replicas, min(layout.replicas, -(-layout.ranks // per_node)), rate)


def _sent(what: str, kind: Kind, bytes: float, calls: int, group: _Group, phase: Phase, beside: bool) -> Traffic:
    """Return the traffic of a collective; `bytes` is the size of the whole tensors of all calls."""
    sent = (2 if kind == "all-reduce" else 1) * bytes * (group.ranks - 1) / group.ranks
    return Traffic(what, kind, group.ranks, calls, sent, sent / group.rate + calls * group.latency(kind), phase, beside)


def _of_objective(recipe: Recipe, every: _Group) -> list[Traffic]:
    """Return the traffic of the terms and of the losses.

    Values that depend only on the encoder are gathered while the decoder computes; the step waits for the rest.
    """
    accumulate = recipe.schedule.accumulate
    images = recipe.schedule.batch_size // (accumulate * every.ranks)
    batch = MicroBatch(geometry(recipe), recipe.model.width, images, every.ranks, number_bytes(recipe))
    costs = [each.cost(batch) for each in losses(recipe.objective)]
    # The loss and the columns of the terms are averaged in one call.
    reported = Sent("all-reduce", 1 + sum(cost.averaged for cost in costs), 1)
    found = {kind: [0, 0] for kind in _LABELS}
    for each in (reported, *(sent for cost in costs for sent in cost.sent)):
        numbers_and_calls = found[each.kind, each.is_beside]
        numbers_and_calls[0] += each.numbers * accumulate
        numbers_and_calls[1] += each.calls * accumulate
    return [
        _sent(_LABELS[kind, beside], kind, numbers * FP32, calls, every, "forward", beside)
        for (kind, beside), (numbers, calls) in found.items()
    ]
