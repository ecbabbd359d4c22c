"""An encoder with a segmentation head.

Letters in shapes: B images, H, W their pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae.model.blocks import Block
from mimae.model.encoder import Encoder
from mimae.model.portable import Form, Graph, head_graph
from mimae.model.units import Model
from mimae.segmentation.attention import BiasedAttention
from mimae.segmentation.heads import Auxiliary, Linear, Pyramid, UperNet
from mimae.segmentation.labels import IGNORED
from mimae.segmentation.settings import SegmentSettings


class Segmenter(Model):
    """A model of an encoder and a head, which takes the maps of four blocks before the encoder's final norm."""

    evaluations = ("logits",)

    def __init__(self, encoder: Encoder, settings: SegmentSettings) -> None:
        super().__init__()
        self.encoder, self.blocks = encoder, settings.maps(encoder.settings.depth)
        encoder.norm = nn.Identity()  # type: ignore[assignment]
        if settings.relative_positions:
            grid = (encoder.grid.rows, encoder.grid.columns)
            for block in encoder.blocks:
                assert isinstance(block, Block)
                block.attn = BiasedAttention(encoder.width, encoder.settings.heads, grid)
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
        """Return the losses of the heads by name, fp32.

        Each is a cross-entropy averaged over all pixels, where an ignored pixel counts as 0.

        Args:
            images: (B, H, W, 3) uint8.
            classes: (B, H, W).
            paths: factors of drop path (B, depth, 2).
            keep: factors of the head's dropout (B, channels).
            keep_auxiliary: factors of the auxiliary head's dropout (B, channels).
        """
        levels = self._levels(self.encoder.maps(images, self.blocks, keep=paths))
        losses = {"main": _loss(self.head(levels, keep), classes)}
        if self.auxiliary_weight:
            losses["auxiliary"] = self.auxiliary_weight * _loss(self.auxiliary(levels[2], keep_auxiliary), classes)
        return losses

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, C, H, W) for images (B, H, W, 3) uint8."""
        return self.segmented(self.encoder.maps(images, self.blocks))

    def segmented(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps of the encoder (B, D, r, c) -> (B, C, H, W)."""
        found = self.head(self._levels(maps))
        return F.interpolate(found.float(), self.encoder.grid.size_hw, mode="bilinear", align_corners=False)

    def graph(self, form: Form) -> Graph:
        """Return the segmenter in plain operators: windows -> logits (B, C, H, W)."""
        parts = {"pyramid": self.pyramid, "head": self.head}
        return head_graph(self.encoder, form, parts, lambda _, maps: self.segmented(maps), self.logits, self.blocks)

    def _levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return what the heads see of the encoder's maps."""
        # The maps have channels last, because they come from tokens. Without the copy the gradients of convolutions
        # would have that layout too, which differs from the buckets of DDP.
        return self.pyramid([each.contiguous() for each in maps])  # type: ignore[no-any-return]


def _loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, C, ., .), which are interpolated to the size of classes (B, H, W)."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = F.interpolate(logits.float(), classes.shape[1:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, classes.long(), ignore_index=IGNORED, reduction="sum")
    # The divisor is equal on all ranks without communication, so the mean over ranks is the mean over the batch.
    return total / classes.numel()
