"""The switch of the MI terms (method 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """The switch of the MI terms: closed until the moving average of L_rec falls below `threshold`, then open for
    good. Its state is on the device, the same on all ranks, and part of the checkpoint."""

    weight: Tensor
    average: Tensor

    def __init__(self, threshold: float | None) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("weight", torch.tensor(1.0 if threshold is None else 0.0, device="cpu"))
        self.register_buffer("average", torch.tensor(float("nan"), device="cpu"))

    @torch.no_grad()
    def update(self, rec: Tensor, skipped: Tensor) -> None:
        """Update the gate after an optimizer step with the global L_rec of that step.

        A value that is not finite, or the value of a `skipped` step, changes nothing.
        """
        if self.threshold is None:
            return
        moved = torch.where(self.average.isnan(), rec, self.average.lerp(rec, 0.01))
        counts = rec.isfinite() & (skipped.to(rec.device) == 0)
        self.average.copy_(torch.where(counts, moved, self.average))
        self.weight.copy_(torch.maximum(self.weight, (self.average < self.threshold).to(self.weight)))
