"""Conversion of positions to another grid of patches, and of patch projections to another patch size.

Letters in shapes: L patches, D width, P patch size.
"""

from __future__ import annotations

import warnings
from math import isqrt

import torch
from torch import Tensor

from mimae.model.geometry import Grid
from mimae.model.positions import resampled, sincos_positions


def grid_of(patches: int, known: tuple[int, int] | None, wanted: Grid) -> Grid | None:
    """Return the grid of a table of positions for `patches` patches: `known`, a square grid, or `wanted`.

    None means that the number of patches fits none of them.
    """
    if known is not None and known[0] * known[1] == patches:
        return Grid(*known, wanted.patch_size)
    side = isqrt(patches)
    if side * side == patches:
        return Grid(side, side, wanted.patch_size)
    return wanted if wanted.patches == patches else None


def with_class_token(positions: Tensor, grid: Grid) -> Tensor:
    """Return positions (1, 1 + L, D) of a table (1, L, D) or (1, 1 + L, D); a missing class token gets zeros."""
    if positions.shape[1] > grid.patches:
        return positions
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)


def for_grid(positions: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Return positions (1, 1 + L, D) for another grid, interpolated as in MAE, see `resampled`."""
    return resampled(positions, grid, other)


def are_sincos(positions: Tensor, grid: Grid) -> bool:
    """Return True if positions (1, 1 + L, D) equal the fixed positions that the decoder computes itself.

    They may be rounded: a file in bf16 has an error of up to 2^-9.
    """
    width = positions.shape[2]
    return width % 4 == 0 and torch.allclose(positions[0], sincos_positions(width, grid), rtol=0, atol=2**-8)


def resized_projection(weight: Tensor, patch_size: int) -> Tensor:
    """Return the weight (D, 3, P, P) of a patch projection, resampled for the patch size `patch_size`.

    It is computed by timm with the pseudo-inverse of image resizing (FlexiViT), so that an enlarged image gives the
    same tokens.
    """
    from timm.layers.patch_embed import resample_patch_embed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resample_patch_embed(weight, [patch_size, patch_size])
