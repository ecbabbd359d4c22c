"""CLUB and V's likelihood by their definitions, with every pair of images and densities of torch.distributions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal


def standardised(latents: Tensor, eps: float) -> Tensor:
    """Return y = (z - m) / sqrt(v + eps), with the detached mean and biased variance of each value of z (B, N, D)."""
    flat = latents.detach().flatten(0, 1)
    mean = flat.mean(0)
    variance = ((flat - mean) ** 2).mean(0)
    return (latents - mean) / torch.sqrt(variance + eps)


def club(y: Tensor, mu: Tensor, log_variance: Tensor) -> Tensor:
    """Return 1/(BN) sum_ik log q(y_ik | x_i) - 1/(B^2 N) sum_ijk log q(y_jk | x_i), in nats.

    y (B, N, D), mu and log_variance (B, D).
    """
    images, views, _ = y.shape
    density = [Normal(mu[i], torch.exp(log_variance[i] / 2)) for i in range(images)]
    own = torch.zeros((), dtype=y.dtype)
    every = torch.zeros((), dtype=y.dtype)
    for i in range(images):
        for k in range(views):
            own = own + density[i].log_prob(y[i, k]).sum()
            for j in range(images):
                every = every + density[i].log_prob(y[j, k]).sum()
    return own / (images * views) - every / (images**2 * views)


def l_fit(y: Tensor, mu: Tensor, log_variance: Tensor) -> Tensor:
    """Return the mean over images, views and values of -log q(y_ik | x_i), minus log(2 pi) / 2; y is a constant."""
    density = Normal(mu[:, None], torch.exp(log_variance[:, None] / 2))
    return -density.log_prob(y.detach()).mean() - math.log(2 * math.pi) / 2
