"""Batch norm without scale and shift, over the batches of all ranks. It precedes a linear classifier.

torch's own batch norm would keep different running moments on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimae import distributed

_EPS = 1e-6
_MOMENTUM = 0.1


class GlobalBatchNorm(nn.Module):
    """Normalise features (B, D) to mean 0 and variance 1 over the micro-batch of all ranks.

    In eval mode the running moments are used. Autograd treats the moments as constants: the input has no gradient,
    because it comes from a frozen encoder.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, device="cpu"))
        self.register_buffer("variance", torch.ones(width, device="cpu"))

    def forward(self, features: Tensor) -> Tensor:
        features = features.float()
        if not self.training:
            return (features - self.mean) * self.scale()
        sums = torch.cat([features.sum(0), features.square().sum(0), features.new_tensor([len(features)])])
        total = distributed.all_sum(sums.double())
        count = total[-1]
        mean, square = (total[:-1] / count).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            self.mean.lerp_(mean.float(), _MOMENTUM)
            self.variance.lerp_((variance * count / (count - 1).clamp_min(1)).float(), _MOMENTUM)
        return ((features - mean) * (variance.clamp_min(0) + _EPS).rsqrt()).float()

    def scale(self) -> Tensor:
        """Return what eval mode multiplies centred features with, (D,)."""
        return (self.variance + _EPS).rsqrt()
