"""Drop path (stochastic depth) and dropout: the factors of paths and channels for each image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mimae.randomness import Purpose, uniform, words


def keep_paths(seed: int, epoch: int, sample_ids: Tensor, rate: float, depth: int) -> Tensor | None:
    """Return the factors of each image's paths for `blocks.run_blocks`: fp32 (B, depth, 2), or None if `rate` is 0.

    Block l has two paths: attention (0) and MLP (1). Each is dropped with probability rate * l / (depth - 1), as in
    timm. A path that is kept is divided by the probability of keeping it. Word 2 l + path of the sample's stream
    decides, so that the result does not depend on ranks and micro-batches.
    """
    if rate == 0:
        return None
    dropped = torch.linspace(0, rate, depth, dtype=torch.float64, device=sample_ids.device).repeat_interleave(2)
    drawn = uniform(words(seed, Purpose.DROP_PATH, epoch, sample_ids, 2 * depth))
    return ((drawn >= dropped) / (1 - dropped)).float().unflatten(1, (depth, 2))


def keep_channels(seed: int, epoch: int, sample_ids: Tensor, rate: float, count: int, first: int = 0) -> Tensor | None:
    """Return the factors of `count` channels of each image: fp32 (B, count), or None if `rate` is 0.

    A channel is dropped with probability `rate`; else it is divided by the probability of keeping it. The words of the
    sample's stream from number `first` on decide.
    """
    if rate == 0:
        return None
    drawn = uniform(words(seed, Purpose.DROPOUT, epoch, sample_ids, count, first))
    return (drawn >= rate).float() / (1 - rate)
