"""Positions of an encoder for another grid of patches.

Letters in shapes: L patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae.model.geometry import Grid


def resampled(positions: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Return positions (1, 1 + L, D) of `grid` for the patches of `other`; the class token keeps its own.

    Bicubic without antialiasing, as MAE's code interpolates them. The same tensor where the grids are equal.
    """
    if (grid.rows, grid.columns) == (other.rows, other.columns):
        return positions
    token, patches = positions[:, :1], positions[:, 1:]
    plane = patches.unflatten(1, (grid.rows, grid.columns)).permute(0, 3, 1, 2)
    plane = F.interpolate(plane.float(), (other.rows, other.columns), mode="bicubic", align_corners=False)
    return torch.cat([token, plane.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)], 1)
