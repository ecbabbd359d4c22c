"""Attention with a learned bias for each distance between two patches, as BEiT has it and MAE's recipe for ADE20K.

Letters in shapes: B windows, L patches, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae.model.blocks import Attention
from mimae.randomness import Initial


class BiasedAttention(Attention):
    """Attention of the class token and the patches of a grid, whose logits have a bias: one for each distance in rows
    and columns, and three for pairs with the class token."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__(width, heads, "sdpa")
        self.grid = grid
        self.rel_pos = nn.Parameter(torch.empty((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def initial_values(self) -> dict[str, Initial]:
        """Return the start of the table: zeros, so that the pretrained encoder begins unchanged."""
        return {"rel_pos": 0.0}

    def forward(self, queries: Tensor, context: Tensor | None = None) -> Tensor:
        """queries (B, 1 + L, D) look at each other -> the same shape."""
        assert context is None
        (packed,) = self.qkv(queries)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in packed.chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def bias(self) -> Tensor:
        """Return what is added to the logits, (H, 1 + L, 1 + L), by query and key."""
        rows, columns = self.grid
        down, across = (
            side[:, None] - side[None, :] + len(side) - 1
            for side in (torch.arange(length, device=self.rel_pos.device) for length in (rows, columns))
        )
        places = (down[:, None, :, None] * (2 * columns - 1) + across[None, :, None, :]).flatten(2).flatten(0, 1)
        between, (of_token, to_token, itself) = self.rel_pos[places], self.rel_pos[-3:]
        count = len(places)
        first = torch.cat([itself.expand(1, 1, -1), of_token.expand(1, count, -1)], 1)
        others = torch.cat([to_token.expand(count, 1, -1), between], 1)
        return torch.cat([first, others]).permute(2, 0, 1)
