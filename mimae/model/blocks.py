"""The transformer block of encoder and decoder: timm's, able to answer for some of its tokens only.

Letters in shapes: S sequences, T tokens, M of them answered for, D width.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(TimmAttention):
    """timm's attention, with the tokens that ask apart from those that are asked."""

    def forward(self, queries: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """queries (S, M, D) look at context (S, T, D); None: at each other -> (S, M, D)."""
        if context is None:
            q, k, v = self._heads(self.qkv(queries))
        else:
            width = queries.shape[-1]
            weights, biases = self.qkv.weight.split([width, 2 * width]), self.qkv.bias.split([width, 2 * width])
            (q,) = self._heads(F.linear(queries, weights[0], biases[0]))
            k, v = self._heads(F.linear(context, weights[1], biases[1]))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """(S, T, n D) -> n of (S, heads, T, D / heads)."""
        S, T, _ = projected.shape
        return projected.view(S, T, -1, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


class Block(TimmBlock):
    """A pre-norm block as MAE and timm's ViT have them: biased qkv, MLP of 4 x width, GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(
            width,
            heads,
            mlp_ratio=4,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
            attn_layer=Attention,
        )

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:  # type: ignore[override]
        """tokens (S, T, D) -> (S, T - first, D): those from place `first` on. What nobody reads of a last block is
        not computed: queries, projection and MLP of the tokens before."""
        context = self.norm1(tokens)
        wanted = self.attn(context[:, first:], context) if first else self.attn(context)
        tokens = tokens[:, first:] + wanted
        return tokens + self.mlp(self.norm2(tokens))


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, recompute: bool, first: int = 0) -> Tensor:
    """tokens (B, N, T, D) through every block, each view a sequence of its own -> (B, N, T - first, D)."""
    flat = tokens.flatten(0, 1)
    for block in blocks:
        skip = first if block is blocks[-1] else 0
        flat = checkpoint(block, flat, skip, use_reentrant=False) if recompute and block.training else block(flat, skip)
    return flat.unflatten(0, tokens.shape[:2])
