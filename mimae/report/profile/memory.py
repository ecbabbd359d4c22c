"""Memory of a step at its peak, by category, and the phase of the peak.

Some categories are sums over known tensors (weights, gradients, optimizer, buffers). The others are sums over
allocations of the step: those that remain after forward are activations, the others are workspace. The peak is computed
from the memory before the profile and all allocations and frees that torch.profiler recorded in two steps. (The profile
does not begin before the model is made: a thread of gloo may free the tensors that DDP broadcasts then, and a profile
records only its own thread.)
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mimae.engines.base import Engine
from mimae.randomness import Part
from mimae.report.profile.marks import BACKWARD, FORWARD, PREFIX, STEP, mark, marked
from mimae.report.profile.phases import GRADIENTS, OTHER
from mimae.report.profile.step import Steps

_NODE = "autograd::engine::evaluate_function: "


class Memory(NamedTuple):
    """Bytes of a step's tensors at their peak."""

    peak: int
    """Bytes of all tensors, by the profiler."""
    owner: str
    """Phase of the peak, in forward or in backward."""
    weights: int
    gradients: int
    optimizer: int
    """State of the optimizer, including the moving average of the weights."""
    buffers: int
    activations: int
    work: int
    """Workspace: inputs and outputs of the operators at the peak, including gradients of activations."""
    kept: dict[str, int]
    """Bytes that the forward of each phase keeps for backward."""

    @property
    def categories(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "buffers", "activations", "work")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """The sum of the categories."""
        return sum(self.categories.values())


class Known(NamedTuple):
    """Bytes of the tensors that persist between steps."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    keeps_gradients: bool = False
    """True if the memory of gradients was allocated before the step, as DDP's buckets are."""
    before: int = 0
    """Bytes of all these tensors that were allocated before the profile."""


class Allocation(NamedTuple):
    """An allocation; negative bytes stand for a free."""

    time: int
    address: int
    bytes: int


class Span(NamedTuple):
    """A mark of the profile with its start and end, in nanoseconds."""

    start: int
    end: int
    name: str


class Trace(NamedTuple):
    """The memory events of a profile, in the order of time."""

    allocations: list[Allocation]
    marks: list[Span]
    nodes: list[tuple[int, int, int]]
    """Start, end and sequence number of each backward node; -1 marks a node that accumulates a gradient."""
    numbers: dict[int, int]
    """Start time of the forward operator with each sequence number of autograd."""


def measure(steps: Steps) -> Memory:
    """Return the memory of the second of two steps."""
    gradients: dict[int, int] = {}

    def seeing_gradients(name: str) -> AbstractContextManager[Any]:
        if name == "optimizer":
            gradients.update(_storages(part.values.grad for part in steps.engine.parts.values()))
        return mark(name)

    gc.collect()  # Memory that was allocated before the profile and freed in it would have a negative count.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        steps.step()
        gc.collect()
        with marked(steps.engine.model):
            steps.step(seeing_gradients)
    results: Any = profiled.profiler
    trace = read(results.kineto_results.experimental_event_tree(), steps.device.type)
    return at_peak(trace, known(steps.engine, gradients, trace))


def known(engine: Engine[Any], gradients: dict[int, int], trace: Trace) -> Known:
    """Return the bytes of an engine's tensors.

    `gradients` has the bytes of the gradients' storages by address, as they were before the update.
    """
    state = [value.values if isinstance(value, Part) else value for value in engine._optimizer_state().values()]
    weights = _storages(part.values for part in engine.parts.values())
    optimizer, buffers = _storages([*state, *engine.ema.values()]), _storages(engine.model.buffers())
    seen = {each.address: each.time for each in trace.allocations if each.bytes > 0}
    start = [span for span in trace.marks if span.name == STEP][-1].start
    everything = weights | gradients | optimizer | buffers
    return Known(
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(optimizer.values()),
        buffers=sum(buffers.values()),
        keeps_gradients=all(seen.get(address, 0) < start for address in gradients),
        before=sum(size for address, size in everything.items() if address not in seen),
    )


def _storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Return the bytes of the tensors' storages by address."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def read(tree: Iterable[Any], device: str) -> Trace:
    """Read the events of a profile: allocations on a device type, marks, and nodes of backward."""
    found = Trace([], [], [], {})
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        start, name = event.start_time_ns, event.name
        if kind == torch._C._profiler._EventType.Allocation:
            if fields.device.type == device:
                found.allocations.append(Allocation(start, fields.ptr, fields.alloc_size))
        elif name.startswith(PREFIX):
            found.marks.append(Span(start, event.end_time_ns, name.removeprefix(PREFIX)))
        elif kind == torch._C._profiler._EventType.TorchOp:
            number = fields.sequence_number
            if name.startswith(_NODE):
                found.nodes.append((start, event.end_time_ns, -1 if "AccumulateGrad" in name else number))
            elif number >= 0:
                # The backward node runs as an operator with the same number later, so the earliest time counts.
                found.numbers[number] = min(start, found.numbers.get(number, start))
    found.allocations.sort()
    found.marks.sort(key=lambda span: (span.start, -span.end))
    return found


def at_peak(trace: Trace, held: Known) -> Memory:
    """Return the memory at the peak of the last step of a trace."""
    step = [span for span in trace.marks if span.name == STEP][-1]
    forwards = [span for span in trace.marks if span.name == FORWARD and span.start >= step.start]
    now, peak, peak_at = held.before, 0, step.start
    for each in trace.allocations:
        now += each.bytes
        if step.start <= each.time <= step.end and now > peak:
            peak, peak_at = now, each.time
    alive = _alive(trace.allocations, peak_at)
    # If a forward is in progress at the peak, tensors that it will free before its end are workspace.
    in_forward = [
        each
        for mark in forwards
        for each in set(alive) & (set(_alive(trace.allocations, mark.end)) if mark.end > peak_at else set(alive))
        if mark.start <= each.time <= mark.end
    ]
    activations = sum(each.bytes for each in in_forward)
    made = sum(each.bytes for each in alive if each.time >= step.start) - activations
    gradients = held.gradients if held.keeps_gradients else min(held.gradients, made)
    work = made if held.keeps_gradients else made - gradients
    kept: Counter[str] = Counter()
    for span in forwards:
        for each in _alive(trace.allocations, span.end):
            if each.time >= span.start:
                kept[_innermost(trace.marks, each.time)] += each.bytes
    owner = _owner(trace, peak_at)
    return Memory(peak, owner, held.weights, gradients, held.optimizer, held.buffers, activations, work, dict(kept))


def _alive(allocations: Iterable[Allocation], moment: int) -> list[Allocation]:
    live: dict[int, Allocation] = {}
    for each in allocations:
        if each.time > moment:
            break
        if each.bytes > 0:
            live[each.address] = each
        else:
            live.pop(each.address, None)
    return list(live.values())


def _innermost(marks: Iterable[Span], moment: int) -> str:
    name = OTHER
    for span in marks:
        if span.start > moment:
            break
        if span.end >= moment:
            name = span.name
    return name


def _owner(trace: Trace, moment: int) -> str:
    name = _innermost(trace.marks, moment)
    if name != BACKWARD:
        return name
    number = next((number for start, end, number in trace.nodes if start <= moment <= end), None)
    if number == -1:
        return GRADIENTS
    made_at = trace.numbers.get(number) if number is not None else None
    return BACKWARD if made_at is None else f"backward of {_innermost(trace.marks, made_at)}"
