"""An encoder in plain operators, for graphs: it normalises pixels and returns tokens and features.

Letters in shapes: B images, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimae.model.encoder import Encoder

Input = Literal["uint8", "float"]
"""uint8: (B, H, W, 3); float: (B, 3, H, W), fp32 in [0, 1]."""


class Portable(nn.Module):
    """The forward of an encoder for whole images. The weights keep their names."""

    pos_embed: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, given: Input, blocks: Sequence[int], is_dynamic: bool) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.blocks = encoder.patch_embed, encoder.cls_token, encoder.blocks
        self.norm, self.grid, self.given, self.is_dynamic = encoder.norm, encoder.grid, given, is_dynamic
        self.wanted = tuple(blocks)
        self.register_buffer("pos_embed", encoder.pos_embed.detach().clone())
        self.register_buffer("mean", encoder.mean.view(3, 1, 1).clone())
        self.register_buffer("std", encoder.std.view(3, 1, 1).clone())
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return tokens (B, 1 + L, D), features (B, D), and block_N (B, D, rows, columns) before the final norm."""
        pixels = images.permute(0, 3, 1, 2).float() / 255 if self.given == "uint8" else images
        pixels = (pixels - self.mean) / self.std
        projection = self.patch_embed.get_submodule("proj")
        weight, bias = projection.get_parameter("weight"), projection.get_parameter("bias")
        plane = F.conv2d(pixels, weight, bias, stride=self.grid.patch_size)
        tokens = torch.cat([self.cls_token.expand(plane.shape[0], -1, -1), plane.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self._positions(plane)
        found = dict[int, Tensor]()
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in self.wanted:
                found[number] = tokens[:, 1:].transpose(1, 2).reshape(plane.shape)
        tokens = self.norm(tokens)
        maps = {f"block_{number}": found[number] for number in self.wanted}  # This is the order of the graph's outputs.
        return {"tokens": tokens, "features": tokens[:, 1:].mean(1), **maps}

    def _positions(self, plane: Tensor) -> Tensor:
        if not self.is_dynamic:
            return self.pos_embed
        token, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        known = patches.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.columns))
        resized = F.interpolate(known, plane.shape[2:], mode="bicubic", align_corners=False)
        return torch.cat([token, resized.flatten(2).transpose(1, 2)], 1)
