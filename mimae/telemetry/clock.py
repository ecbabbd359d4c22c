"""Clocks of a run: seconds by phase, and rates between two readings."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mimae.telemetry.records import PHASES

IN_PHASE = "in the phase "
"""Prefix of the note that is added to an exception raised inside a phase."""


class Phases:
    """Seconds spent in each of PHASES since the object was made: `with phases("forward"): ...`.

    The time of a nested phase is subtracted from the outer one, so the sum counts no time twice. An exception gets a
    note that names its phase. On CUDA a phase is timed on the device by a pair of events, without a wait until
    `seconds()` is read. There, waiting for data is the time in which the device was idle: from the end of its queued
    work until it gets more, and zero if it was busy throughout. Saving checkpoints is timed by the host's clock, as all
    phases are on the CPU.
    """

    _HOST = ("checkpoint",)

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._pending: deque[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        assert name in PHASES, name
        outer = self._open[-1] if self._open else None
        if outer is not None and self._uses_events(outer) != self._uses_events(name):
            outer = None  # Host and device have separate clocks: the host may wait while the device works.
        self._open.append(name)
        try:
            if self._uses_events(name):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                try:
                    yield
                finally:
                    end.record()
                    self._pending.append((name, outer, start, end))
                    self._settle_done()  # This keeps the queue short.
            else:
                began = time.perf_counter()
                try:
                    yield
                finally:
                    self._add(name, outer, time.perf_counter() - began)
        except Exception as error:
            error.add_note(IN_PHASE + name)
            raise
        finally:
            self._open.pop()

    @property
    def data_seconds(self) -> float:
        """Return the seconds spent waiting for data, without a wait: on CUDA, unfinished work is not yet included."""
        self._settle_done()
        return self._seconds["data"]

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase. On CUDA this waits for the device."""
        if self._pending:
            self._pending[-1][3].synchronize()
        self._settle_done()
        return dict(self._seconds)

    def _uses_events(self, name: str) -> bool:
        return self._on_cuda and name not in self._HOST

    def _settle_done(self) -> None:
        """Add the phases that the device has finished."""
        while self._pending and self._pending[0][3].query():
            name, outer, start, end = self._pending.popleft()
            self._add(name, outer, start.elapsed_time(end) / 1000)

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds


class Pace:
    """Rates since the last reading. A run has one object for the logged steps and another for the epochs."""

    def __init__(self, phases: Phases, num_masks: int) -> None:
        self._phases = phases
        self._num_masks = num_masks
        self._began = time.perf_counter()
        self._waited = phases.data_seconds
        self._by_phase = phases.seconds()

    def rates(self, images: int) -> dict[str, float]:
        """Return `images_per_s`, `views_per_s` and `data_wait` (0 to 1) for `images` images since the last reading."""
        now, waited = time.perf_counter(), self._phases.data_seconds
        seconds = max(now - self._began, 1e-9)
        rates = {
            "images_per_s": images / seconds,
            "views_per_s": images * self._num_masks / seconds,
            "data_wait": min((waited - self._waited) / seconds, 1.0),
        }
        self._began, self._waited = now, waited
        return rates

    def epoch(self, images: int) -> dict[str, float]:
        """Return `rates`, `images`, `seconds` and the phases' `seconds_*`. On CUDA this waits for the device."""
        by_phase = self._phases.seconds()
        spent = {f"seconds_{phase}": by_phase[phase] - self._by_phase[phase] for phase in PHASES}
        self._by_phase = by_phase
        seconds = time.perf_counter() - self._began
        return {"images": images, "seconds": seconds, **self.rates(images), **spent}
