"""CLUB and the likelihood, against the pairwise definition; forward `club_terms`, backward `club_grad`.

The letters in shapes are those of `case`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimae.bench.ops.cases.case import (
    LARGE_BATCHES,
    Bound,
    Case,
    Count,
    Inputs,
    Pass,
    Point,
    Size,
    by_view,
    named,
    pick,
)
from mimae.kernels.club import launch_backward, launch_forward
from mimae.objective import club


def _club_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    # V gives mu as the first half of its output, and log s2 after a tanh.
    mu, log_s2 = torch.randn(batch, 2 * size.width, device=device).chunk(2, 1)
    of_batch = ("mean", "variance", "inverse_sum", "mu_inverse_sum")
    return {
        "z": torch.randn(batch, size.views, size.width, device=device),
        "mu": mu,
        "log_s2": log_s2.tanh(),
        **{name: torch.rand(size.width, device=device) for name in of_batch},
    }


_CLUB_ARGUMENTS = ("z", "mu", "log_s2", "mean", "variance")


def _pairwise(inputs: Inputs) -> Sequence[Tensor]:
    """Return CLUB over all pairs of a latent and an image, and the likelihood; z (N B, D)."""
    z, mu, log_s2 = inputs["z"], inputs["mu"], inputs["log_s2"]
    views = z.shape[0] // mu.shape[0]
    variance, mean = torch.var_mean(z.detach(), 0, correction=0)
    y = (z - mean) / (variance + 1e-6).sqrt()

    def log_density(y: Tensor, mu: Tensor, log_s2: Tensor) -> Tensor:
        return -0.5 * (log_s2 + (y - mu) ** 2 / log_s2.exp())

    fixed_mu, fixed_log_s2 = mu.detach(), log_s2.detach()
    positive = log_density(y, fixed_mu.repeat(views, 1), fixed_log_s2.repeat(views, 1)).sum(-1).mean()
    pairs = log_density(y[None], fixed_mu[:, None], fixed_log_s2[:, None])
    nll = -log_density(y.detach(), mu.repeat(views, 1), log_s2.repeat(views, 1)).mean()
    return positive - pairs.sum(-1).mean(), nll


def _club(inputs: Inputs) -> Sequence[Tensor]:
    if "moments" not in inputs:  # In training `view_latents` provides them.
        flat = inputs["z"].detach().flatten(0, 1)
        variance, mean = torch.var_mean(flat, 0, correction=0)
        inputs["moments"] = torch.stack([mean, variance * len(flat)])
    return club.CLUB.apply(inputs["z"], inputs["mu"], inputs["log_s2"], inputs["moments"])


CLUB = Case(
    op="club",
    sizes=LARGE_BATCHES,
    inputs=_club_inputs,
    passes=(
        Pass(
            "club_terms",
            counted=Count((Point(48, 1), Point(48, 2), Point(96, 2), Point(64, 4))),
            run=lambda inputs: launch_forward(**named(inputs, _CLUB_ARGUMENTS)),
            reads=pick(*_CLUB_ARGUMENTS),
        ),
        Pass(
            "club_grad",
            counted=Count((Point(48, 1), Point(48, 2), Point(96, 2), Point(64, 4))),
            run=lambda inputs: launch_backward(**inputs, images=inputs["z"].shape[0]),
            reads=lambda inputs: list(inputs.values()),
        ),
    ),
    prepare=lambda size, inputs: {**inputs, "z": by_view(inputs["z"])},
    eager=_pairwise,
    public=_club,
    bound=Bound(issued=1.1, eager=3),
    trained=("z", "mu", "log_s2"),
)
