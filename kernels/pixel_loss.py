from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def pixel_loss(
    predictions: Tensor,
    images: Tensor,
    targets: Tensor,
    mean: Tensor,
    std: Tensor,
    normalize: bool,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """See `reference.pixel_loss`."""
    return reference.pixel_loss(predictions, images, targets, mean, std, normalize, scale)
