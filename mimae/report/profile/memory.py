"""Memory of a step: what holds it at the peak, by category, and whose the peak is.

The categories are sums over tensors that are known (weights, gradients, optimizer, buffers), and over allocations of
the step: those that forward leaves behind are activations, the rest is work. The peak is the running sum of all that
torch.profiler saw since before the model was made. Both are counted apart, so they can be held against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mimae.engines.base import Engine
from mimae.randomness import Part
from mimae.report.profile.marks import BACKWARD, FORWARD, PREFIX, STEP, marked
from mimae.report.profile.phases import GRADIENTS, OTHER
from mimae.report.profile.step import Steps

_NODE = "autograd::engine::evaluate_function: "


class Memory(NamedTuple):
    """Bytes of a step's tensors at their peak."""

    peak: int
    """All of them, by the profiler."""
    owner: str
    """Where the peak lies: a phase, in forward or in backward."""
    weights: int
    gradients: int
    optimizer: int
    """With the moving average of the weights."""
    buffers: int
    activations: int
    work: int
    """Inputs and outputs of the operators that run at the peak, gradients of activations among them."""
    kept: dict[str, int]
    """Bytes that the forward of each phase leaves behind for backward."""

    @property
    def categories(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "buffers", "activations", "work")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """The sum of the categories."""
        return sum(self.categories.values())


class Known(NamedTuple):
    """Bytes of the tensors that stay from step to step."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int


class Allocation(NamedTuple):
    """An allocation, or (negative bytes) its end."""

    time: int
    address: int
    bytes: int


class Span(NamedTuple):
    """A mark, or a node of backward with the time at which forward made it."""

    start: int
    end: int
    name: str


class Trace(NamedTuple):
    """Memory events of a profile, in the order of time."""

    allocations: list[Allocation]
    marks: list[Span]
    nodes: list[tuple[int, int, int]]
    """Start, end and autograd's number of each node of backward; -1: it sums up a gradient."""
    numbers: dict[int, int]
    """Time at which an operator of forward got an autograd's number."""


def measure(make: Callable[[], Steps]) -> tuple[Steps, Memory]:
    """Return the steps that `make` made, after two of them, and the memory of the second."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        steps = make()
        steps.step()
        with marked(steps.engine.model):
            steps.step()
    results: Any = profiled.profiler
    tree = results.kineto_results.experimental_event_tree()
    return steps, at_peak(read(tree, steps.device.type), known(steps.engine))


def known(engine: Engine[Any]) -> Known:
    """Return what an engine holds. Gradients have the size of their weights; between two steps there may be none."""
    weights = _bytes(part.values for part in engine.parts.values())
    state = [value.values if isinstance(value, Part) else value for value in engine._optimizer_state().values()]
    return Known(weights, weights, _bytes([*state, *engine.ema.values()]), _bytes(engine.model.buffers()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def read(tree: Iterable[Any], device: str) -> Trace:
    """Read the events of a profile: allocations on a type of device, marks, and nodes of backward."""
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
                # The node itself runs as an operator too, later.
                found.numbers[number] = min(start, found.numbers.get(number, start))
    found.allocations.sort()
    found.marks.sort(key=lambda span: (span.start, -span.end))
    return found


def at_peak(trace: Trace, held: Known) -> Memory:
    """Return the memory at the peak of the last step of a trace."""
    step = [mark for mark in trace.marks if mark.name == STEP][-1]
    forwards = [mark for mark in trace.marks if mark.name == FORWARD and mark.start >= step.start]
    now = peak = at_start = 0
    peak_at = step.start
    for each in trace.allocations:
        now += each.bytes
        if each.time < step.start:
            at_start = now
        elif each.time <= step.end and now > peak:
            peak, peak_at = now, each.time
    alive = _alive(trace.allocations, peak_at)
    # What a forward under way at the peak will not leave behind is work.
    in_forward = [
        each
        for mark in forwards
        for each in set(alive) & (set(_alive(trace.allocations, mark.end)) if mark.end > peak_at else set(alive))
        if mark.start <= each.time <= mark.end
    ]
    activations = sum(each.bytes for each in in_forward)
    made = sum(each.bytes for each in alive if each.time >= step.start) - activations
    # An engine that keeps its gradients from step to step has made them before this one.
    keeps_gradients = at_start - held.weights - held.optimizer - held.buffers >= 0.9 * held.gradients
    gradients = held.gradients if keeps_gradients else min(held.gradients, made)
    work = made if keeps_gradients else made - gradients
    kept: Counter[str] = Counter()
    for mark in forwards:
        for each in _alive(trace.allocations, mark.end):
            if each.time >= mark.start:
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
    for mark in marks:
        if mark.start > moment:
            break
        if mark.end >= moment:
            name = mark.name
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
