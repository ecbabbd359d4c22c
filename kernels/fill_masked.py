from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def fill_masked(
    tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor, impl: Impl = "auto"
) -> Tensor:
    """See `reference.fill_masked`."""
    return reference.fill_masked(tokens, visible, targets, mask_token, pos)
