"""Masks: which patches each view of an image shows and which it predicts.

To add a kind, name it in `MaskingSettings.kind`, describe it in `settings.MASK_KINDS`, and draw it in DRAWS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mimae.kernels import orthogonal_masks
from mimae.model.geometry import Grid, Sections
from mimae.model.settings import MaskingSettings, Predict


class Draw(Protocol):
    """A function that draws the masks of a batch."""

    def __call__(
        self, seed: int, epoch: int, sample_ids: Tensor, grid: Grid, num_views: int, num_visible: int
    ) -> tuple[Tensor, Tensor]:
        """Return visible (B, N, K) and hidden (B, N, L - K) on the device of `sample_ids` (B,).

        Both are int32 patch ids, ascending in each view, and a pure function of (seed, epoch, sample_id).
        """


def _orthogonal(
    seed: int, epoch: int, sample_ids: Tensor, grid: Grid, num_views: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Split one random permutation of the patches over the views of an image."""
    return orthogonal_masks(seed, epoch, sample_ids, grid.patches, num_views, num_visible)


def _independent(
    seed: int, epoch: int, sample_ids: Tensor, grid: Grid, num_views: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Draw a permutation for each view, with the key seed + view * 2^32 (a recipe's seed is below 2^32).

    With N=1 the masks are those of `_orthogonal`.
    """
    views = [_orthogonal(seed + (view << 32), epoch, sample_ids, grid, 1, num_visible) for view in range(num_views)]
    return torch.cat([visible for visible, _ in views], 1), torch.cat([hidden for _, hidden in views], 1)


DRAWS: dict[str, Draw] = {"orthogonal": _orthogonal, "independent": _independent}
"""Functions that draw masks, by masking.kind."""


def draw(masking: MaskingSettings, seed: int, epoch: int, sample_ids: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Draw the masks of a batch: visible (B, N, K) and hidden (B, N, L - K), as `Draw` describes them."""
    num_visible = masking.num_visible(grid.patches)
    return DRAWS[masking.kind](seed, epoch, sample_ids, grid, masking.num_masks, num_visible)


def targets(predict: Predict, visible: Tensor, hidden: Tensor) -> Tensor:
    """Return the patches (B, N, M) that each view's decoder predicts, given visible (B, N, K) and hidden (B, N, L - K).

    With predict=hidden they are all patches that the view hides: M = L - K. With predict=next_view they are the visible
    patches of the next view (of the first one, for the last view): M = K. If the views are disjoint, every visible
    patch of an image is then predicted exactly once, from another view.
    """
    return hidden if predict == "hidden" else visible.roll(-1, 1)


def views(
    recipe: Sections, seed: int, epoch: int, sample_ids: Tensor, size_hw: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the patches that each view of a batch shows and predicts: visible (B, N, K) and targets (B, N, M).

    `size_hw` is the height and width of the images; None stands for data.image_size.
    """
    grid = Grid.of(size_hw or recipe.data.size_hw, recipe.model.patch_size)
    visible, hidden = draw(recipe.masking, seed, epoch, sample_ids, grid)
    return visible, targets(recipe.decoder.predict, visible, hidden)
