from __future__ import annotations

from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl


def club_terms(
    z: Tensor, mu: Tensor, log_s2: Tensor, mean: Tensor, variance: Tensor, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.club_terms`."""
    return reference.club_terms(z, mu, log_s2, mean, variance)


def club_grad(
    z: Tensor,
    mu: Tensor,
    log_s2: Tensor,
    mean: Tensor,
    variance: Tensor,
    inverse_sum: Tensor,
    mu_inverse_sum: Tensor,
    images: int,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.club_grad`."""
    return reference.club_grad(z, mu, log_s2, mean, variance, inverse_sum, mu_inverse_sum, images)
