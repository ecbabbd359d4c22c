"""Time by phase, from the events of torch.profiler.

The phase of an operator is the innermost mark around it. The backward of a phase is found by autograd's sequence
numbers: a forward operator and its backward node have the same number. Time of a step outside all marks is `other`.

On CUDA the time of a phase is that of the kernels that its operators launched; the time between kernels is `idle`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

from mimae.report.profile.marks import BACKWARD, FORWARD, PREFIX, STEP

OTHER, IDLE, GRADIENTS, COMMUNICATION = "other", "idle", "gradients", "gradient communication"

_NODE = "autograd::engine::evaluate_function: "
_ACCUMULATE = "AccumulateGrad"
_WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Operators and calls in which the host waits for the device."""

_OUTER = {STEP, FORWARD, BACKWARD}
"""Marks whose own time, without the time of marks inside, counts as `other`."""


@dataclass
class Phase:
    """A part of a step. Seconds and counts are averages per step."""

    name: str
    forward: float = 0.0
    """Seconds in forward."""
    backward: float = 0.0
    """Seconds in backward."""
    launches: float = 0.0
    """Number of kernels on CUDA; on the CPU, number of operators that no other operator calls."""
    waits: float = 0.0
    """Number of times that the host waited for the device."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Span:
    """A mark, or a node of backward; start and end are in nanoseconds."""

    name: str
    is_backward: bool
    start: int
    end: int


def phases(events: Iterable[Any], on_cuda: bool) -> dict[str, Phase]:
    """Return the phases of the profiled steps by name, including `other`. Their seconds add up to the steps' time."""
    host, kernels = [], []
    for event in events:
        if event.device_type() == DeviceType.CPU:
            if event.name() != "[memory]":
                host.append(event)
        elif not event.is_user_annotation():
            kernels.append(event)
    step_spans = [event for event in host if event.name() == PREFIX + STEP]
    steps, threads = len(step_spans), {event.start_thread_id() for event in step_spans}
    by_phase = _Host(host, threads, is_timed=not on_cuda)
    if on_cuda:
        by_phase.add_kernels(kernels, step_spans)
    found = {}
    for name, phase in by_phase.phases.items():
        found[name] = Phase(name, *(value / steps for value in (phase.forward, phase.backward)))
        found[name].launches, found[name].waits = phase.launches / steps, phase.waits / steps
    return found


class _Host:
    """The assignment of the host's events to phases, in the order of time."""

    def __init__(self, events: Sequence[Any], threads: set[int], is_timed: bool) -> None:
        self.phases: dict[str, Phase] = {}
        self._is_timed = is_timed
        self._by_number: dict[int, str] = {}
        """Phase of forward by autograd's sequence number."""
        self._by_operator: dict[int, tuple[str, bool]] = {}
        """Phase by the correlation id of an operator, for its kernels."""
        self._open: list[tuple[Span, int]] = []
        """Open spans, each with the nanoseconds of the spans inside it."""
        self._called = 0
        """End of the last operator that no other operator calls."""
        for event in sorted(events, key=lambda event: (event.start_ns(), -event.end_ns())):
            # Autograd has a separate thread for a GPU. Nested events are always in the same thread.
            if event.start_thread_id() in threads or event.name().startswith(_NODE) or not is_timed:
                self._see(event)
        self._close(1 << 62)

    def add_kernels(self, kernels: Sequence[Any], steps: Sequence[Any]) -> None:
        """Add each kernel's time to the phase of the operator that launched it; the remaining time is idle."""
        busy = 0
        for kernel in kernels:
            name, is_backward = self._by_operator.get(kernel.linked_correlation_id(), (OTHER, False))
            if kernel.name().startswith("nccl"):
                name = COMMUNICATION
            self._add(name, kernel.duration_ns(), is_backward)
            self._phase(name).launches += 1
            busy += kernel.duration_ns()
        self._add(IDLE, max(0, sum(step.duration_ns() for step in steps) - busy), False)

    def _see(self, event: Any) -> None:
        self._close(event.start_ns())
        name, start, end = event.name(), event.start_ns(), event.end_ns()
        if name.startswith(PREFIX):
            is_backward = any(span.name == BACKWARD for span, _ in self._open)
            self._open.append((Span(name.removeprefix(PREFIX), is_backward, start, end), 0))
        elif not self._open:
            return
        elif name.startswith(_NODE):
            known = GRADIENTS if _ACCUMULATE in name else self._by_number.get(event.sequence_nr(), OTHER)
            self._open.append((Span(known, True, start, end), 0))
        else:
            self._operator(event)

    def _operator(self, event: Any) -> None:
        span = self._open[-1][0]
        if event.sequence_nr() >= 0 and not span.is_backward and span.name != BACKWARD:
            self._by_number[event.sequence_nr()] = span.name
        name = _own(span.name)
        self._by_operator[event.correlation_id()] = (name, span.is_backward)
        phase = self._phase(name)
        if event.name() in _WAITS:
            phase.waits += 1
        if self._is_timed and event.start_ns() >= self._called:
            self._called = event.end_ns()
            phase.launches += 1

    def _close(self, now: int) -> None:
        """Close the spans that end before `now`, and add their own time, without the spans inside, to their phases."""
        while self._open and self._open[-1][0].end <= now:
            span, inside = self._open.pop()
            length = span.end - span.start
            if self._open:
                outer, other = self._open[-1]
                self._open[-1] = (outer, other + length)
            if self._is_timed:
                self._add(_own(span.name), length - inside, span.is_backward)

    def _add(self, name: str, nanoseconds: int, is_backward: bool) -> None:
        phase = self._phase(name)
        if is_backward:
            phase.backward += nanoseconds / 1e9
        else:
            phase.forward += nanoseconds / 1e9

    def _phase(self, name: str) -> Phase:
        return self.phases.setdefault(name, Phase(name))


def _own(name: str) -> str:
    """Return the phase of the time directly inside a span."""
    return OTHER if name in _OUTER else name
