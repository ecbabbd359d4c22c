"""The objective of MI-MAE (method 3):

    L = L_rec + g (w_max L_max + w_min L_min) + L_fit

Statistics are global: the MI terms see the batch of all ranks. Latents, moments and log-sum-exps are gathered and V's
sums reduced, all in forward; with them each rank computes the whole gradient of its own latents, so backward needs no
collective. Latents and moments depend on the encoder alone: they are on their way while the decoder computes. Engines
average gradients over the W ranks, so an MI term's backward yields W dL/du.

Letters in shapes: B images of this rank, N views, T tokens, D width, M targets, P patch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimae import kernels
from mimae.distributed import all_gather, all_sum, rank, start_all_gather, world_size
from mimae.objective.posterior import Posterior, saturation
from mimae.objective.settings import ObjectiveSettings


class Losses(NamedTuple):
    """fp32 scalars of one micro-batch; None where a term is off. `loss` is local and carries the graph, the others
    are global and detached, the same on every rank; `total` is the global `loss`."""

    loss: Tensor
    total: Tensor
    rec: Tensor
    max_mi: Tensor | None
    min_mi: Tensor | None
    fit: Tensor | None
    mi_lower_nats: Tensor | None
    mi_upper_nats: Tensor | None
    saturated: Tensor | None
    latents: Tensor
    """z (B, N, D) of this rank, detached, for the diagnostics of collapse."""


class Latents(NamedTuple):
    """Of each view of this rank, and on their way from all ranks: what the MI terms need of the encoder."""

    z: Tensor
    """(B, N, D)."""
    u: Tensor
    """(B, N, D), unit vectors: the direction of z, or of its projection."""
    columns: Callable[[], Tensor] | None
    """Waits for u of all ranks, (W B, N, D); None without L_max."""
    moments: Callable[[], Tensor] | None
    """Waits for mean and sum of squared deviations of z on each rank, (2 W, D); None without L_min."""


class InfoNCE(torch.autograd.Function):
    """L_max of the global batch: (u (B, N, D) of this rank, u (W B, N, D) of all, tau (1,)) -> scalar, the same on
    every rank. The gradient of u is the whole one, as row and as column; `columns` gets none."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, columns: Tensor, tau: Tensor) -> Tensor:
        ctx.offset = rank() * u.shape[0]
        lse, positives = kernels.infonce_lse(u, columns, ctx.offset, tau)
        lse, positives = all_gather(torch.stack([lse, positives], 1)).unbind(1)
        ctx.terms = columns.shape[0] * u.shape[1] * (u.shape[1] - 1)
        ctx.save_for_backward(u, columns, tau, lse.contiguous())
        return (lse - positives).sum() / ctx.terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        u, columns, tau, lse = ctx.saved_tensors
        d_u, d_tau = kernels.infonce_grad(u, columns, ctx.offset, tau, lse)
        scale = grad * world_size() / ctx.terms
        return d_u * scale, None, d_tau * scale


class CLUB(torch.autograd.Function):
    """(z (B, N, D), mu and log s2 (B, D) of this rank, moments (2 W, D) of all) -> CLUB in nats of the global batch,
    and V's mean negative log-likelihood per dimension over this rank's latents. CLUB trains z alone, the likelihood V
    alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mu: Tensor, log_s2: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        B, N, D = z.shape
        mean, variance = global_moments(moments, B * N)
        club, nll, inverse, mu_inverse = kernels.club_terms(z, mu, log_s2, mean, variance)
        # The scalar last: in front it would leave the others off the 16 bytes that a GPU loads at once.
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
    """(mean, sum of squared deviations) over `count` latents on each of W ranks, (2 W, D), merged by Chan's formula
    -> mean and biased variance (D,) over the global batch."""
    means, squares = moments.view(-1, 2, moments.shape[1]).unbind(1)
    mean = means.mean(0)
    variance = (squares + count * (means - mean).square()).sum(0) / (count * means.shape[0])
    return mean, variance


class Gate(nn.Module):
    """The switch of the MI terms: closed until the moving average of L_rec falls below `threshold`, then open for
    good. Its state is on the device, the same on all ranks, and part of the checkpoint."""

    weight: Tensor
    average: Tensor

    def __init__(self, threshold: float | None) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("weight", torch.tensor(1.0 if threshold is None else 0.0, device="cpu"))
        self.register_buffer("average", torch.tensor(float("nan"), device="cpu"))

    @torch.no_grad()
    def update(self, rec: Tensor, skipped: Tensor) -> None:
        """After an optimizer step, with the global L_rec of that step; one that is not finite, or of a step that was
        `skipped`, changes nothing."""
        if self.threshold is None:
            return
        moved = torch.where(self.average.isnan(), rec, self.average.lerp(rec, 0.01))
        counts = rec.isfinite() & (skipped.to(rec.device) == 0)
        self.average.copy_(torch.where(counts, moved, self.average))
        self.weight.copy_(torch.maximum(self.weight, (self.average < self.threshold).to(self.weight)))


class Objective(nn.Module):
    """Losses of one micro-batch, and the small networks that only they need: V, projector, temperature, gate.

    What a term of weight 0 would need is not built: a run without CLUB pays for no V.
    """

    def __init__(self, settings: ObjectiveSettings, num_views: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if settings.max_mi > 0 and num_views < 2:
            raise ValueError(f"objective.max_mi needs at least 2 views, masking.num_masks is {num_views}")
        self.settings = settings
        self.gate = Gate(settings.gate_loss)
        self.posterior = Posterior(grid, settings.posterior_width, width) if settings.min_mi > 0 else None
        self.projector = (
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            if settings.max_mi > 0 and settings.projector == "mlp"
            else None
        )
        # One element, not a scalar: DeepSpeed refuses 0-dim parameters.
        self.log_temperature = (
            nn.Parameter(torch.empty(1)) if settings.max_mi > 0 and settings.learn_temperature else None
        )

    def initial_values(self) -> dict[str, float]:
        """Constants of the initialisation (see `randomness.initialise`)."""
        return {"log_temperature": math.log(self.settings.temperature)}

    def latents(self, tokens: Tensor) -> Latents:
        """tokens (B, N, 1+K, D) of the encoder -> latents, whose gathering runs beside what follows: to be called
        before the decoder."""
        settings = self.settings
        if settings.latent == "class_token":
            z, u, moments = kernels.view_latents(tokens[:, :, :1])
        else:
            z, u, moments = kernels.view_latents(tokens, first=1)
        if self.projector is not None:
            u = F.normalize(self.projector(z), dim=-1)
        columns = start_all_gather(u) if settings.max_mi > 0 else None
        return Latents(z, u, columns, start_all_gather(moments) if settings.min_mi > 0 else None)

    def forward(
        self, predictions: Tensor, latents: Latents, images: Tensor, targets: Tensor, mean: Tensor, std: Tensor
    ) -> Losses:
        """predictions (B, N, M, 3P^2), `latents` of the same images, images (B, H, W, 3) uint8, targets (B, N, M),
        mean and std (3,) of the data set."""
        settings, (z, u, columns, moments) = self.settings, latents
        share = 1 / targets.numel()
        rec = kernels.pixel_loss(predictions, images, targets, mean, std, settings.normalize_pixels, scale=share)
        loss, local_means = rec, [rec.detach()]
        max_mi = min_mi = fit = lower = upper = saturated = None
        if columns is not None:
            max_mi = InfoNCE.apply(u, columns(), self._temperature(u))
            loss = loss + self.gate.weight * settings.max_mi * max_mi
            max_mi = max_mi.detach()
            lower = math.log(u.shape[0] * world_size()) - max_mi
        if self.posterior is not None and moments is not None:
            mu, log_s2 = self.posterior(images, mean, std)
            upper, nll = CLUB.apply(z, mu, log_s2, moments())
            loss = loss + self.gate.weight * settings.min_mi * upper / z.shape[-1] + nll
            upper = upper.detach()
            min_mi = upper / z.shape[-1]
            local_means += [nll.detach(), saturation(log_s2.detach())]
        total, rec, *of_posterior = all_sum(torch.stack([loss.detach(), *local_means])) / world_size()
        if of_posterior:
            fit, saturated = of_posterior
        return Losses(loss, total, rec, max_mi, min_mi, fit, lower, upper, saturated, z.detach())

    def _temperature(self, like: Tensor) -> Tensor:
        if self.log_temperature is None:
            return like.new_full((1,), self.settings.temperature)
        # Below the bound the value stops but the gradient goes on, so that the temperature finds back.
        return self.log_temperature.exp() + (0.01 - self.log_temperature.detach().exp()).clamp_min(0)
