"""Heads of segmentation, which map four feature maps of an encoder to the logits of each pixel.

Their norms are GroupNorm and LayerNorm, which do not depend on the batch, so that any engine can train them.

Letters in shapes: B images, D width of the encoder, W width of the head, r, c rows and columns of patches, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae.randomness import Initial, Normal

_GROUPS, _CHANNELS = 32, 8

POOLS = (1, 2, 3, 6)
"""Sides of the grids to which the coarsest map is pooled."""

AUXILIARY_WIDTH = 256
"""Number of channels of the auxiliary head."""


class Classes(nn.Conv2d):
    """A 1 x 1 convolution that computes the logits at each position of a map."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes, 1)

    def initial_values(self) -> dict[str, Initial]:
        """Return the initial values that differ from the rules of `randomness.initialise`."""
        return {"weight": Normal(0.01)}


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels at each position of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _norm(width: int) -> nn.GroupNorm:
    """Return a GroupNorm of at most 32 groups, each with several channels.

    In a map of 1 x 1 a group with a single channel would always be normalised to 0.
    """
    most = max(1, min(_GROUPS, width // _CHANNELS))
    return nn.GroupNorm(max(n for n in range(1, most + 1) if width % n == 0), width)


def _conv(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """Return a convolution followed by a norm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), _norm(outputs), nn.ReLU())


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """Multiply the channels of each image by `keep` (B, W)."""
    return x if keep is None else x * keep[:, :, None, None].to(x.dtype)


class Linear(nn.Module):
    """A head of one linear layer on the four maps, each of which has a separate norm."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(inputs, eps=1e-6) for _ in range(4))
        self.classes = Classes(4 * inputs, classes)

    def forward(self, maps: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Return logits (B, C, r, c) for four maps (B, D, r, c)."""
        return self.classes(torch.cat([norm(each) for norm, each in zip(self.norms, maps)], 1))


class Pyramid(nn.Module):
    """Layers that resize four maps of one size to 4, 2, 1 and 1/2 times that size."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def double() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, 2, 2)

        self.levels = nn.ModuleList(
            [
                nn.Sequential(double(), _norm(width), nn.GELU(), double()),
                double(),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(each) for level, each in zip(self.levels, maps)]


class UperNet(nn.Module):
    """UPerHead of mmsegmentation (Xiao et al., Unified Perceptual Parsing for Scene Understanding).

    It pools the coarsest map, builds a feature pyramid down to the finest map, and fuses all levels to one map.
    """

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(_conv(inputs, width, 1) for _ in POOLS)
        self.pooled = _conv(inputs + len(POOLS) * width, width, 3)
        self.laterals = nn.ModuleList(_conv(inputs, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in range(3))
        self.fused = _conv(4 * width, width, 3)
        self.classes = Classes(width, classes)

    def forward(self, levels: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Return logits (B, C, ., .) at the finest size.

        `levels` are maps (B, D, ., .) from the finest to the coarsest. `keep` (B, W) has the factors of dropout.
        """
        coarsest = levels[3]
        pools = [
            _resized(pool(F.adaptive_avg_pool2d(coarsest, side)), coarsest.shape[2:])
            for side, pool in zip(POOLS, self.pools)
        ]
        top = self.pooled(torch.cat([coarsest, *pools], 1))
        found = [top]
        for level, lateral in zip(reversed(levels[:3]), reversed(self.laterals)):
            top = lateral(level) + _resized(top, level.shape[2:])
            found.insert(0, top)
        smooth = [conv(each) for conv, each in zip(self.smooth, found)] + [found[3]]
        size = smooth[0].shape[2:]
        fused = self.fused(torch.cat([smooth[0], *(_resized(each, size) for each in smooth[1:])], 1))
        return self.classes(_kept(fused, keep))


class Auxiliary(nn.Module):
    """The auxiliary head: FCNHead of mmsegmentation with one convolution."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv = _conv(inputs, AUXILIARY_WIDTH, 3)
        self.classes = Classes(AUXILIARY_WIDTH, classes)

    def forward(self, level: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits (B, C, r, c) for a map (B, D, r, c). `keep` (B, 256) has the factors of dropout."""
        return self.classes(_kept(self.conv(level), keep))
