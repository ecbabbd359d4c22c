"""V, the network that approximates q(latent | image) for CLUB (method 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimae.model.geometry import Grid

_LOG_VARIANCE_BOUND = 3.0


class Posterior(nn.Module):
    """Network with one hidden layer: from the image, averaged to one RGB value per patch, to a diagonal Gaussian."""

    def __init__(self, grid: Grid, hidden: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.hidden = nn.Linear(3 * grid.patches, hidden)
        self.output = nn.Linear(hidden, 2 * width)

    def forward(self, images: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu (B, D) and log s2 (B, D), bounded softly to (-3, 3), for images (B, H, W, 3) uint8."""
        B, _, _, C = images.shape
        rows, columns, P = self.grid
        pixels = images.view(B, rows, P, columns, P, C).to(self.hidden.weight.dtype)
        colours = (pixels.mean((2, 4)) / 255 - mean) / std
        mu, log_s2 = self.output(nn.functional.gelu(self.hidden(colours.flatten(1)))).chunk(2, -1)
        return mu, _LOG_VARIANCE_BOUND * torch.tanh(log_s2 / _LOG_VARIANCE_BOUND)


def saturation(log_s2: Tensor) -> Tensor:
    """Return the share of V's log-variances beyond 90 % of their bound.

    A large share means that the bound is too low.
    """
    return (log_s2.abs() > 0.9 * _LOG_VARIANCE_BOUND).to(log_s2.dtype).mean()
