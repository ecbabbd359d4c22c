"""Detection of steps whose gradient is not finite, without waiting for the device; too many of them end the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mimae.errors import RunError

MAX_SKIPPED = 10
"""Number of consecutive non-finite steps that ends a run."""


class NonFinite:
    """Record of the steps that the device skipped. It is one step late, so that the host never waits for the device."""

    def __init__(
        self,
        run: Path,
        samples: Callable[[int], list[int]],
        keep: Callable[[int, int], bool],
        note: Callable[..., None] = lambda kind, **details: None,
    ) -> None:
        """Store the callbacks.

        `samples(step)` returns the ids of the step's global batch. `keep(first, last)` saves the weights for
        `mimae replay` and returns whether it succeeded: all steps in between were skipped, so the weights did not
        change. `note("skipped", step=...)` keeps a record of each skipped step."""
        self.run, self.samples, self.keep, self.note = run, samples, keep, note
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.streak: list[int] = []

    def check(self, step: int, skipped: Tensor) -> None:
        """Read the decision of the previous step.

        Raises RunError when the ten most recent steps were all skipped. One good step resets the count.
        """
        self._read()
        event = torch.cuda.Event() if skipped.is_cuda else None
        copied = skipped.to("cpu", non_blocking=True)
        if event is not None:
            event.record()
        self.pending.append((step, copied, event))
        if len(self.streak) >= MAX_SKIPPED:
            self.drain()

    def drain(self) -> None:
        """Read the remaining decisions before a checkpoint: a failing run must not replace a good checkpoint."""
        self._read()
        if len(self.streak) < MAX_SKIPPED:
            return
        first, last = self.streak[0], self.streak[-1]
        start = "" if self.keep(first, last) else ", from the last checkpoint on, since their weights could not be kept"
        steps = "\n".join(f"  step {step}: samples {self.samples(step)}" for step in self.streak)
        raise RunError(
            f"{len(self.streak)} steps in a row had a gradient that is not finite; the checkpoints of {self.run} are "
            f"unchanged. `mimae replay {self.run} --step {first}` shows what is not finite and where it begins{start}. "
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
            self.note("skipped", step=step)
