"""What keeps a run from harm: signals that save, and steps whose gradient is not finite."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimae.errors import UserError

WAIT_AFTER_SIGNAL = 30.0
"""Seconds that a run which was told to stop waits for the next batch."""

MAX_SKIPPED = 10
"""Non-finite steps in a row that end a run."""


class RunError(UserError):
    """The run cannot start, or cannot go on."""


class NonFinite:
    """Follows the steps that the device skipped, a step late, so that the host never waits for the step in flight."""

    def __init__(self, run: Path, samples: Callable[[int], list[int]], keep: Callable[[int, int], bool]) -> None:
        """`samples`: the ids of the global batch of a step; `keep`: saves the weights for `mimae replay`, which are
        those before the first and after the last of two steps, and returns whether it could."""
        self.run, self.samples, self.keep = run, samples, keep
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.streak: list[int] = []

    def check(self, step: int, skipped: Tensor) -> None:
        """Reads the decision of the step before. Raises RunError after ten skipped steps in a row, the last taken among
        them: a run that recovers goes on."""
        self._read()
        event = torch.cuda.Event() if skipped.is_cuda else None
        copied = skipped.to("cpu", non_blocking=True)
        if event is not None:
            event.record()
        self.pending.append((step, copied, event))
        if len(self.streak) >= MAX_SKIPPED:
            self.drain()

    def drain(self) -> None:
        """Reads the decisions that are left; before a checkpoint, so that a doomed run does not replace a good one."""
        self._read()
        if len(self.streak) < MAX_SKIPPED:
            return
        first, last = self.streak[0], self.streak[-1]
        start = "" if self.keep(first, last) else ", from the last checkpoint on, since their weights could not be kept"
        steps = "\n".join(f"  step {step}: samples {self.samples(step)}" for step in self.streak)
        raise RunError(
            f"{len(self.streak)} steps in a row had a gradient that is not finite; the checkpoints of {self.run} are "
            f"untouched. `mimae replay {self.run} --step {first}` tells what is not finite and where it begins{start}. "
            f"Lower optimizer.learning_rate, set optimizer.clip, or look at the samples:\n{steps}"
        )

    def _read(self) -> None:
        while self.pending:
            step, skipped, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if skipped.item() == 0:
                self.streak.clear()
                continue
            self.streak.append(step)


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C as a wish to save and stop, agreed on by all ranks one step late, over the host."""

    def __init__(self) -> None:
        self.received = False
        self._waits_for = ""
        self._wish = torch.zeros(1)
        self._work: Any = None

    def __enter__(self) -> Signals:
        self._old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        self._old[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._waits_for:
            signal.setitimer(signal.ITIMER_REAL, WAIT_AFTER_SIGNAL)

    def _on_alarm(self, number: int, _: FrameType | None) -> None:
        if self._waits_for:
            raise RunError(
                f"told to stop, and {self._waits_for} did not come for {WAIT_AFTER_SIGNAL:.0f} s: the run ends; the "
                "same command goes on from its last checkpoint"
            )

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Let a signal end what the block waits for, WAIT_AFTER_SIGNAL seconds later. Raises RunError then."""
        self._waits_for = what
        if self.received:
            signal.setitimer(signal.ITIMER_REAL, WAIT_AFTER_SIGNAL)
        try:
            yield
        finally:
            self._waits_for = ""
            if self.received:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def agreed(self) -> bool:
        """True on every rank after the same step once any of them was told to stop."""
        if self._work is not None:
            self._work.wait()
            if self._wish.item() > 0:
                self.received = True
                return True
        self._wish = torch.full((1,), float(self.received))
        self._work = dist.all_reduce(self._wish, async_op=True)
        return False
