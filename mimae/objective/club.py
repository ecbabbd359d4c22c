"""L_min, CLUB between latent and image, and L_fit, V's likelihood (method 3). Letters as in `objective.loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mimae import kernels
from mimae.distributed import all_sum, start_all_gather, world_size
from mimae.model.geometry import Grid
from mimae.objective.costs import FP32, Cost, MicroBatch, Sent
from mimae.objective.loss import Inputs, Latents, Loss, Result
from mimae.objective.posterior import Posterior, saturation


class CLUB(torch.autograd.Function):
    """CLUB in nats over the global batch, and V's mean negative log-likelihood per dimension over this rank's latents.

    Inputs: z (B, N, D), mu and log s2 (B, D) of this rank, moments (2 W, D) of all ranks. CLUB has a gradient only for
    z, the likelihood only for V.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, mu: Tensor, log_s2: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        B, N, D = z.shape
        mean, variance = global_moments(moments, B * N)
        club, nll, inverse, mu_inverse = kernels.club_terms(z, mu, log_s2, mean, variance)
        # The scalar is last: in front it would shift the others off the 16-byte alignment of vector loads.
        inverse, mu_inverse, club = all_sum(torch.cat([inverse, mu_inverse, club[None]])).split([D, D, 1])
        ctx.images, ctx.local = B * world_size(), B * N * D
        ctx.save_for_backward(z, mu, log_s2, mean, variance, inverse, mu_inverse)
        return club[0] / (ctx.images * N), nll / ctx.local

    @staticmethod
    def backward(ctx: Any, d_club: Tensor, d_nll: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, mu, log_s2, mean, variance, inverse, mu_inverse = ctx.saved_tensors
        d_z, d_mu, d_log_s2 = kernels.club_grad(z, mu, log_s2, mean, variance, inverse, mu_inverse, ctx.images)
        d_z = d_z * (d_club * world_size() / (ctx.images * z.shape[1]))
        return d_z, d_mu * (d_nll / ctx.local), d_log_s2 * (d_nll / ctx.local), None


def global_moments(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (D,) over the global batch.

    `moments` (2 W, D) has the mean and the sum of squared deviations over `count` latents for each of W ranks. They are
    merged by Chan's formula.
    """
    means, squares = moments.view(-1, 2, moments.shape[1]).unbind(1)
    mean = means.mean(0)
    variance = (squares + count * (means - mean).square()).sum(0) / (count * means.shape[0])
    return mean, variance


class MinMI(Loss):
    """CLUB per dimension, which trains the encoder, and the likelihood of V, which trains V."""

    def networks(self, width: int, grid: Grid) -> dict[str, nn.Module | nn.Parameter]:
        return {"posterior": Posterior(grid, self.settings.posterior_width, width)}

    def start(self, latents: Latents, own: Any) -> Callable[[], Tensor]:
        """Start to gather mean and sum of squared deviations of z; return a function that waits for them, (2 W, D)."""
        return start_all_gather(latents.moments)

    def compute(self, inputs: Inputs, begun: Any, own: Any, factor: Tensor | float) -> Result:
        z = inputs.latents.z
        mu, log_s2 = own.posterior(inputs.images, inputs.mean, inputs.std)
        upper, nll = CLUB.apply(z, mu, log_s2, begun())
        nats = upper.detach()
        return Result(
            [factor * upper / z.shape[-1], nll],
            {"fit": nll.detach(), "saturated": saturation(log_s2.detach())},
            {"min_mi": nats / z.shape[-1], "mi_upper_nats": nats},
        )

    def cost(self, batch: MicroBatch) -> Cost:
        """Count V's layers, the images in fp32 that V averages, V's sums, CLUB, and the moments."""
        grid, D = batch.geometry.grid, batch.width
        height, width = grid.size_hw
        return Cost(
            kept=batch.images * (3 * grid.patches + 2 * self.settings.posterior_width + 4 * D) * FP32,
            work=batch.images * height * width * 3 * FP32,
            sent=(
                Sent("all-gather", batch.ranks * 2 * D, 1, is_beside=True),
                Sent("all-reduce", 2 * D + 1, 1),
            ),
            averaged=2,
        )
