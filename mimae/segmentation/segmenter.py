"""An encoder with a head of segmentation.

Letters in shapes: B images, H, W their pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae.model.encoder import Encoder
from mimae.model.units import Model
from mimae.segmentation.heads import Auxiliary, Linear, Pyramid, UperNet
from mimae.segmentation.labels import IGNORED
from mimae.segmentation.settings import SegmentSettings


class Segmenter(Model):
    """The maps of four blocks of an encoder, before its final norm, and a head."""

    evaluations = ("logits",)

    def __init__(self, encoder: Encoder, settings: SegmentSettings) -> None:
        super().__init__()
        self.encoder, self.blocks = encoder, settings.maps(encoder.settings.depth)
        encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.auxiliary_weight = settings.auxiliary if settings.head == "upernet" else 0.0
        if settings.head == "linear":
            self.pyramid: nn.Module = nn.Identity()
            self.head: nn.Module = Linear(encoder.width, settings.number)
        else:
            self.pyramid = Pyramid(encoder.width)
            self.head = UperNet(encoder.width, settings.width, settings.number)
        if self.auxiliary_weight:
            self.auxiliary = Auxiliary(encoder.width, settings.number)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the encoder."""
        return tuple(self.encoder.blocks)

    def forward(
        self,
        images: Tensor,
        classes: Tensor,
        paths: Tensor | None = None,
        keep: Tensor | None = None,
        keep_auxiliary: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """images (B, H, W, 3) uint8, classes (B, H, W), paths (B, depth, 2) of drop path, keep of the heads' dropout
        -> their losses, fp32: cross-entropies, over all pixels, where an ignored pixel counts as 0."""
        levels = self._levels(images, paths)
        losses = {"main": _loss(self.head(levels, keep), classes)}
        if self.auxiliary_weight:
            losses["auxiliary"] = self.auxiliary_weight * _loss(self.auxiliary(levels[2], keep_auxiliary), classes)
        return losses

    def logits(self, images: Tensor) -> Tensor:
        """images (B, H, W, 3) uint8 -> (B, C, H, W)."""
        found = self.head(self._levels(images))
        return F.interpolate(found.float(), images.shape[1:3], mode="bilinear", align_corners=False)

    def _levels(self, images: Tensor, paths: Tensor | None = None) -> list[Tensor]:
        """Return what the heads see."""
        maps = self.encoder.maps(images, self.blocks, keep=paths)
        # Their channels lie next to each other, as tokens do; gradients of convolutions would have that order too,
        # another one than the buckets of DDP.
        return self.pyramid([each.contiguous() for each in maps])  # type: ignore[no-any-return]


def _loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, C, ., .), enlarged to classes (B, H, W)."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = F.interpolate(logits.float(), classes.shape[1:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, classes.long(), ignore_index=IGNORED, reduction="sum")
    # By a number that no rank has to ask others for: the mean over ranks is that of the batch.
    return total / classes.numel()
