from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def infonce_lse(rows: Tensor, columns: Tensor, offset: int, tau: Tensor, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """See `reference.infonce_lse`."""
    return reference.infonce_lse(rows, columns, offset, tau)


def infonce_grad(
    rows: Tensor, columns: Tensor, offset: int, tau: Tensor, lse: Tensor, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """See `reference.infonce_grad`."""
    return reference.infonce_grad(rows, columns, offset, tau, lse)
