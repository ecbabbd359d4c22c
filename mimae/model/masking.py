"""Masks: which patches each view of an image shows and which it predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from mimae import kernels
from mimae.model.settings import MaskingSettings, Predict


def draw(
    masking: MaskingSettings, seed: int, epoch: int, sample_ids: Tensor, num_patches: int
) -> tuple[Tensor, Tensor]:
    """Draws the masks of a batch on the device of `sample_ids` (B,).

    Returns visible (B, N, K) and hidden (B, N, L - K), int32, ascending in each view: a pure function of
    (seed, epoch, sample_id). Independent views draw their own permutation each, from the key of
    seed + view * 2^32 (a recipe's seed is below 2^32), so that with N=1 the two kinds agree.
    """
    visible = masking.num_visible(num_patches)
    if masking.kind == "orthogonal":
        return kernels.orthogonal_masks(seed, epoch, sample_ids, num_patches, masking.num_masks, visible)
    views = [
        kernels.orthogonal_masks(seed + (view << 32), epoch, sample_ids, num_patches, 1, visible)
        for view in range(masking.num_masks)
    ]
    return torch.cat([v for v, _ in views], 1), torch.cat([h for _, h in views], 1)


def targets(predict: Predict, visible: Tensor, hidden: Tensor) -> Tensor:
    """What each view's decoder predicts, of visible (B, N, K) and hidden (B, N, L - K) patch ids -> (B, N, M).

    hidden: all that the view hides, M = L - K. next_view: what the next view shows, the first after the last, M = K;
    orthogonal views then have every visible patch predicted once per image, from another view.
    """
    return hidden if predict == "hidden" else visible.roll(-1, 1)
