"""Measures of a collapse of the encoder: four numbers about a batch of latents, for epochs.jsonl."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def collapse(latents: Tensor) -> dict[str, float | None]:
    """Return measures of collapse for latents (M, D), or (B, N, D) with the views of an image along the second axis.

    deviation       mean over the dimensions of the standard deviation over all latents; 0: all are one point
    effective_rank  exp of the entropy of the normalised eigenvalues of the covariance, 1 to min(M - 1, D);
                    0: the latents do not vary (Roy and Vetterli, 2007)
    alignment       mean of |u_a - u_b|^2 over the pairs of views of an image; 0: the views agree
    uniformity      log of the mean of exp(-2 |u_i - u_j|^2) over latents of distinct images; 0: all have the same
                    direction, about -4: spread over the sphere (both Wang and Isola, 2020)

    The numbers are computed in fp32 with u = z / |z|. A number that is not defined is None: alignment of one view,
    uniformity of one image, and all of them if a latent is not finite.
    """
    z_BND = (latents if latents.ndim == 3 else latents.unsqueeze(1)).float()
    u_BND = functional.normalize(z_BND, dim=-1)
    z_MD = z_BND.flatten(0, 1)
    if not torch.isfinite(z_MD).all():
        return dict.fromkeys(("deviation", "effective_rank", "alignment", "uniformity"))
    images, views = z_BND.shape[:2]
    return {
        "deviation": z_MD.std(0, correction=0).mean().item(),
        "effective_rank": _effective_rank(z_MD),
        "alignment": _alignment(u_BND) if views > 1 else None,
        "uniformity": _uniformity(u_BND) if images > 1 else None,
    }


def _effective_rank(z_MD: Tensor) -> float:
    centred = z_MD - z_MD.mean(0)
    # Use the smaller of the two Gram matrices: both have the covariance's nonzero eigenvalues, times M.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = eigenvalues.sum()
    # A variation below the rounding of the mean counts as none: the rank of noise would look healthy.
    if total <= z_MD.numel() * (torch.finfo(torch.float32).eps * z_MD.abs().max()) ** 2:
        return 0.0
    return torch.special.entr(eigenvalues / total).sum().exp().item()


def _alignment(u_BND: Tensor) -> float:
    pairs = torch.combinations(torch.arange(u_BND.shape[1], device=u_BND.device))
    differences = u_BND[:, pairs[:, 0]] - u_BND[:, pairs[:, 1]]
    return differences.square().sum(-1).mean().item()


def _uniformity(u_BND: Tensor) -> float:
    images, views = u_BND.shape[:2]
    total = torch.zeros((), dtype=torch.float64, device=u_BND.device)
    same_image = torch.eye(images, dtype=torch.bool, device=u_BND.device)
    for first in range(views):
        for second in range(views):
            squared = (2 - 2 * (u_BND[:, first] @ u_BND[:, second].T)).clamp(min=0)
            total += torch.exp(-2 * squared).masked_fill(same_image, 0).sum(dtype=torch.float64)
    return (total / (views**2 * images * (images - 1))).log().item()
