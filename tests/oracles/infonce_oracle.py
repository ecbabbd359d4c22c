"""L_max of the method by its definition: a softmax over images for each image and ordered pair of views."""

from __future__ import annotations

import torch
from torch import Tensor


def l_max(latents: Tensor, temperature: Tensor | float) -> Tensor:
    """Return L_max of latents (B, N, D) of any length; it is differentiable in the latents and in the temperature.

    The denominator of image i and the pair (a, b) has view b of every image j, but no other view of i.
    """
    images, views, _ = latents.shape
    u = latents / torch.sqrt((latents**2).sum(-1, keepdim=True))
    total = torch.zeros((), dtype=latents.dtype)
    for a in range(views):
        for b in range(views):
            if a == b:
                continue
            for i in range(images):
                logits = torch.stack([(u[i, a] * u[j, b]).sum() / temperature for j in range(images)])
                total = total - (logits[i] - torch.logsumexp(logits, 0))
    return total / (images * views * (views - 1))
