"""Drop path (stochastic depth) and dropout: which paths and channels are kept for each image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mimae.randomness import Purpose, uniform, words


def keep_paths(seed: int, epoch: int, sample_ids: Tensor, rate: float, depth: int) -> Tensor | None:
    """Return what multiplies the paths of each image, as `blocks.run_blocks` takes it: fp32 (B, depth, 2), or None
    where nothing is dropped.

    The path of block l, of its attention (0) or its MLP (1), is dropped with probability rate * l / (depth - 1), as
    timm does it; a path that is kept is divided by the probability that it is. Word 2 l + path of the sample's stream
    decides, so that ranks and micro-batches do not matter.
    """
    if rate == 0:
        return None
    dropped = torch.linspace(0, rate, depth, dtype=torch.float64, device=sample_ids.device).repeat_interleave(2)
    drawn = uniform(words(seed, Purpose.DROP_PATH, epoch, sample_ids, 2 * depth))
    return ((drawn >= dropped) / (1 - dropped)).float().unflatten(1, (depth, 2))


def keep_channels(seed: int, epoch: int, sample_ids: Tensor, rate: float, count: int, first: int = 0) -> Tensor | None:
    """Return what multiplies `count` channels of each image: fp32 (B, count), or None where nothing is dropped.

    A channel is dropped with probability `rate`, else divided by the probability that it is kept. Words `first` on of
    the sample's stream decide.
    """
    if rate == 0:
        return None
    drawn = uniform(words(seed, Purpose.DROPOUT, epoch, sample_ids, count, first))
    return (drawn >= rate).float() / (1 - rate)
