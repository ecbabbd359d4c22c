from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def embed_visible(
    images: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor,
    std: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """See `reference.embed_visible`."""
    return reference.embed_visible(images, visible, weight, bias, pos, cls, mean, std)
