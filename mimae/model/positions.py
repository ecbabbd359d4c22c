"""Interpolation of an encoder's positions for another grid of patches.

Letters in shapes: L patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae.model.geometry import Grid


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
