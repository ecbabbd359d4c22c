"""MAE's decoder. Its sequence is class token | visible | targets, so that the predictions are a slice of it.

Letters in shapes: B images, N views, L patches, K visible, M targets, D encoder width, Dd decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimae import kernels
from mimae.model.blocks import Block, run_blocks
from mimae.model.geometry import Grid
from mimae.model.positions import sincos_positions
from mimae.model.settings import DecoderSettings, ModelSettings


class Decoder(nn.Module):
    """A decoder that predicts the pixels of the target patches from the encoded visible tokens.

    With cross attention the targets do not attend to each other. Each block's queries are the targets. Its keys and
    values come from the projected tokens of the encoder, class token included: no block changes these tokens, and each
    block applies its own norm to them.
    """

    pos_embed: Tensor

    def __init__(self, settings: DecoderSettings, encoder: ModelSettings, grid: Grid) -> None:
        super().__init__()
        self.is_cross = settings.attention == "cross"
        self.encoder_settings = encoder
        self.embed = nn.Linear(encoder.width, settings.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, settings.width))
        self.register_buffer("pos_embed", sincos_positions(settings.width, grid)[None], persistent=False)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, encoder.attention, eps=encoder.norm_eps)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=encoder.norm_eps)
        self.head = nn.Linear(settings.width, grid.values)

    def forward(self, tokens: Tensor, visible: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return predictions (B, N, M, 3P^2) for tokens (B, N, 1+K, D), visible (B, N, K) and targets (B, N, M).

        `positions` (1 + L, Dd) are those of the images' grid; None stands for the decoder's own.
        """
        table = self.pos_embed[0] if positions is None else positions
        filled = kernels.fill_masked(self.embed(tokens), visible, targets, self.mask_token[0, 0], table)
        shown = tokens.shape[2]
        if self.is_cross:
            context = filled[:, :, :shown]
            decoded = run_blocks(self.blocks, filled[:, :, shown:], self.encoder_settings, context=context)
        else:
            decoded = run_blocks(self.blocks, filled, self.encoder_settings, first=shown)
        return self.head(self.norm(decoded))
