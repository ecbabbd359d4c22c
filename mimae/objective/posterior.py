"""V, the network that approximates q(latent | image) for CLUB (method 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimae.model.geometry import Grid

_LOG_VARIANCE_BOUND = 3.0


class Posterior(nn.Module):
    """Network with one hidden layer: from the image, averaged to one RGB value per cell of `grid`, to a diagonal
    Gaussian. The cells are the patches of images of data.image_size; smaller images are divided into as many cells."""

    def __init__(self, grid: Grid, hidden: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.hidden = nn.Linear(3 * grid.patches, hidden)
        self.output = nn.Linear(hidden, 2 * width)

    def forward(self, images: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu (B, D) and log s2 (B, D), bounded softly to (-3, 3), for images (B, H, W, 3) uint8."""
        pixels = images.to(self.hidden.weight.dtype)
        colours = (cell_means(pixels, self.grid.rows, self.grid.columns) / 255 - mean) / std
        mu, log_s2 = self.output(nn.functional.gelu(self.hidden(colours.flatten(1)))).chunk(2, -1)
        return mu, _LOG_VARIANCE_BOUND * torch.tanh(log_s2 / _LOG_VARIANCE_BOUND)


def cell_means(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Return the mean of each cell, (B, rows, columns, C), of images (B, H, W, C) that are divided evenly.

    Where a side is no multiple of the number of cells, a cell has every pixel that it touches.
    """
    B, H, W, C = pixels.shape
    if H % rows == 0 and W % columns == 0:
        return pixels.view(B, rows, H // rows, columns, W // columns, C).mean((2, 4))
    return nn.functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2), (rows, columns)).permute(0, 2, 3, 1)


def saturation(log_s2: Tensor) -> Tensor:
    """Return the share of V's log-variances beyond 90 % of their bound.

    A large share means that the bound is too low.
    """
    return (log_s2.abs() > 0.9 * _LOG_VARIANCE_BOUND).to(log_s2.dtype).mean()
