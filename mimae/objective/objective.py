"""The objective of MI-MAE (method 3), a sum over the terms of `TERMS`:

    L = L_rec + g (w_max L_max + w_min L_min) + L_fit

Statistics are global: the MI terms use the batch of all ranks. In forward, latents, moments and log-sum-exps are
gathered and V's sums are reduced. With them each rank computes the whole gradient of its own latents, so backward needs
no collective. Latents and moments depend only on the encoder, so they are sent while the decoder computes. Engines
average gradients over the W ranks, so an MI term's backward returns W dL/du.

Letters in shapes: B images of this rank, N views, T tokens, D width, M targets, P patch size.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimae import kernels
from mimae.distributed import all_sum, world_size
from mimae.model.geometry import Grid
from mimae.objective.gate import Gate
from mimae.objective.loss import Inputs, Latents, Loss, losses
from mimae.objective.settings import ObjectiveSettings
from mimae.objective.terms import DIAGNOSTICS, ESTIMATES, LOSSES


class Losses(NamedTuple):
    """fp32 scalars of one micro-batch."""

    loss: Tensor
    """Local sum of all terms, with the graph."""
    columns: dict[str, Tensor]
    """The global loss and the columns of each term, by name in the order of the records. They are detached and equal on
    every rank. A disabled term has no columns."""
    latents: Tensor
    """z (B, N, D) of this rank, detached, for the diagnostics of collapse."""


class Started(NamedTuple):
    """The latents of this rank, and the result of each term's `begin`."""

    latents: Latents
    begun: list[Any]


class Objective(nn.Module):
    """Losses of one micro-batch, and the small networks that only the losses need: V, projector, temperature, gate.

    Networks of a term of weight 0 are not built: a run without CLUB has no V.
    """

    def __init__(self, settings: ObjectiveSettings, num_views: int, width: int, grid: Grid) -> None:
        super().__init__()
        self.settings = settings
        self.losses = losses(settings)
        for loss in self.losses:
            if "views" in loss.term.compares and num_views < 2:
                key = f"objective.{loss.term.weight}"
                raise ValueError(f"{key} needs at least 2 views, masking.num_masks is {num_views}")
        self.gate = Gate(settings.gate_loss)
        networks = {name: each for loss in self.losses for name, each in loss.networks(width, grid).items()}
        # Sort by name, so that the order of parameters does not depend on the list of terms.
        for name in sorted(networks):
            setattr(self, name, networks[name])

    def initial_values(self) -> dict[str, float]:
        """Return the constants of the initialisation (see `randomness.initialise`)."""
        return {name: value for loss in self.losses for name, value in loss.initial_values().items()}

    def start(self, tokens: Tensor) -> Started:
        """Make the latents from the encoder's tokens (B, N, 1+K, D), and begin all terms.

        Call this before the decoder: the terms' collectives overlap with the computation that follows.
        """
        if self.settings.latent == "class_token":
            latents = Latents(*kernels.view_latents(tokens[:, :, :1]))
        else:
            latents = Latents(*kernels.view_latents(tokens, first=1))
        return Started(latents, [loss.start(latents, self) for loss in self.losses])

    def forward(
        self, predictions: Tensor, started: Started, images: Tensor, targets: Tensor, mean: Tensor, std: Tensor
    ) -> Losses:
        """Return the losses.

        predictions (B, N, M, 3P^2), `started`: the result of `start` for the same images, images (B, H, W, 3) uint8,
        targets (B, N, M), mean and std (3,) of the data set.
        """
        inputs = Inputs(predictions, images, targets, mean, std, started.latents)
        results = [
            loss.compute(inputs, begun, self, self._factor(loss))
            for loss, begun in zip(self.losses, started.begun, strict=True)
        ]
        total = reduce(add, [summand for result in results for summand in result.summands])
        means = {"loss": total.detach()} | {key: value for result in results for key, value in result.means.items()}
        averages = all_sum(torch.stack(list(means.values()))) / world_size()
        columns = dict(zip(means, averages, strict=True))
        columns |= {key: value for result in results for key, value in result.columns.items()}
        order = (*LOSSES, *ESTIMATES, *DIAGNOSTICS)
        assert columns.keys() <= set(order), f"no term declares the columns {columns.keys() - set(order)}"
        return Losses(total, {key: columns[key] for key in order if key in columns}, started.latents.z.detach())

    def _factor(self, loss: Loss) -> Tensor | float:
        """Return the weight of a term times that of the gate."""
        weight = 1.0 if loss.term.weight is None else float(getattr(self.settings, loss.term.weight))
        return self.gate.weight * weight if loss.term.is_gated else weight
