"""L_max, InfoNCE between the views of an image over the global batch (method 3). Letters as in `objective.loss`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimae import kernels
from mimae.distributed import all_gather, rank, start_all_gather, world_size
from mimae.model.geometry import Grid
from mimae.objective.costs import FP32, Cost, MicroBatch, Sent
from mimae.objective.loss import Inputs, Latents, Loss, Result


class InfoNCE(torch.autograd.Function):
    """L_max of the global batch, a scalar that is equal on every rank.

    Inputs: u (B, N, D) of this rank, `columns` (W B, N, D) of all ranks, tau (1,). The gradient of u is the whole one,
    of its use as rows and as columns; `columns` has no gradient.
    """

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


class MaxMI(Loss):
    """InfoNCE on the directions of the latents or of their projections, with a fixed or learned temperature."""

    def networks(self, width: int, grid: Grid) -> dict[str, nn.Module | nn.Parameter]:
        found: dict[str, nn.Module | nn.Parameter] = {}
        if self.settings.projector == "mlp":
            found["projector"] = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        if self.settings.learn_temperature:
            # It has one element and is not a scalar: DeepSpeed refuses 0-dim parameters.
            found["log_temperature"] = nn.Parameter(torch.empty(1))
        return found

    def initial_values(self) -> dict[str, float]:
        return {"log_temperature": math.log(self.settings.temperature)}

    def start(self, latents: Latents, own: Any) -> tuple[Tensor, Callable[[], Tensor]]:
        """Start to gather u; return u of this rank, and a function that waits for u of all ranks, (W B, N, D)."""
        projected = self.settings.projector == "mlp"
        u = F.normalize(own.projector(latents.z), dim=-1) if projected else latents.u
        return u, start_all_gather(u)

    def compute(self, inputs: Inputs, begun: Any, own: Any, factor: Tensor | float) -> Result:
        u, columns = begun
        max_mi = InfoNCE.apply(u, columns(), self._temperature(u, own))
        value = max_mi.detach()
        lower = math.log(u.shape[0] * world_size()) - value
        return Result([factor * max_mi], {}, {"max_mi": value, "mi_lower_nats": lower})

    def _temperature(self, like: Tensor, own: Any) -> Tensor:
        if not self.settings.learn_temperature:
            return like.new_full((1,), self.settings.temperature)
        # Below the bound the value is constant but the gradient continues, so that the temperature can return.
        return own.log_temperature.exp() + (0.01 - own.log_temperature.detach().exp()).clamp_min(0)

    def cost(self, batch: MicroBatch) -> Cost:
        """Count the directions and log-sum-exps of all ranks, and the projector's layers."""
        N, D = batch.geometry.views, batch.width
        everywhere = batch.ranks * batch.views
        projector = batch.views * 7 * D if self.settings.projector == "mlp" else 0
        # The panel of weights needs at most the memory of the gradient of all latents.
        work = {"fused": everywhere * D, "fake": 0, "plain": 2 * batch.ranks * batch.images**2}[batch.ops]
        return Cost(
            kept=everywhere * N * FP32,
            kept_early=(everywhere * D + projector) * FP32,
            work=work * FP32,
            sent=(
                Sent("all-gather", everywhere * D, 1, is_beside=True),
                Sent("all-gather", everywhere * N * 2, 1),  # log-sum-exps and positives
            ),
        )
