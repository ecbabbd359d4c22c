from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def view_latents(
    tokens: Tensor, visible: Tensor | None = None, first: int = 0, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.view_latents`."""
    return reference.view_latents(tokens, visible, first)
