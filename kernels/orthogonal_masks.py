from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def orthogonal_masks(
    seed: int, epoch: int, sample_ids: Tensor, num_patches: int, num_views: int, num_visible: int, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """See `reference.orthogonal_masks`."""
    return reference.orthogonal_masks(seed, epoch, sample_ids, num_patches, num_views, num_visible)
