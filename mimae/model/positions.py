"""Positions of patches: fixed sines and cosines, and an encoder's interpolated for another grid.

Letters in shapes: L patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae.model.geometry import Grid


def sincos_positions(width: int, grid: Grid) -> Tensor:
    """Return fixed sin-cos positions (1 + L, D), fp32, computed in float64, in MAE's layout.

    The class token's position is zero. The first half of the channels has sin and cos of the column, the second half
    has those of the row, at frequencies 10000^(-4i/D). Raises ValueError if D is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, got {width}")
    with torch.device("cpu"):
        omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        rows, columns = torch.meshgrid(
            torch.arange(grid.rows, dtype=torch.float64),
            torch.arange(grid.columns, dtype=torch.float64),
            indexing="ij",
        )
        angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]
        table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
        return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).to(torch.float32)


def resampled(positions: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Interpolate positions (1, 1 + L, D) from `grid` to the patches of `other`; the class token's position is kept.

    The interpolation is bicubic without antialiasing, as in MAE's code. If the grids are equal, the same tensor is
    returned.
    """
    if (grid.rows, grid.columns) == (other.rows, other.columns):
        return positions
    token, patches = positions[:, :1], positions[:, 1:]
    plane = patches.unflatten(1, (grid.rows, grid.columns)).permute(0, 3, 1, 2)
    plane = F.interpolate(plane.float(), (other.rows, other.columns), mode="bicubic", align_corners=False)
    return torch.cat([token, plane.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)], 1)


class GridPositions(nn.Module):
    """The fixed positions of several grids, for a model that is trained on images of several sizes."""

    def __init__(self, width: int, grids: Iterable[Grid]) -> None:
        super().__init__()
        for grid in grids:
            self.register_buffer(self._name(grid), sincos_positions(width, grid), persistent=False)

    def forward(self, grid: Grid) -> Tensor | None:
        """Return the positions (1 + L, D) of a grid, or None for one that is not among the grids."""
        return self._buffers.get(self._name(grid))

    @staticmethod
    def _name(grid: Grid) -> str:
        return f"{grid.rows}x{grid.columns}"
