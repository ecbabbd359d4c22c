"""The transformer block of encoder and decoder, under the names of timm's, able to answer for some tokens only.

Letters in shapes: S sequences, M tokens that ask, T tokens that are asked, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimae.model.attention import BACKENDS, PACKED
from mimae.model.recomputation import call
from mimae.model.settings import Checkpointing


class QKV(nn.Linear):
    """One weight (3D, D) for queries, keys and values, of one set of tokens or of two."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, queries: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """queries (S, M, D), context (S, T, D) -> q (S, M, D), k and v (S, T, D); without a context one tensor
        (S, M, 3D) with all three of the queries."""
        if context is None:
            return (super().forward(queries),)
        parts = [self.in_features, 2 * self.in_features]
        (weight_q, weight_kv), (bias_q, bias_kv) = self.weight.split(parts), self.bias.split(parts)
        return F.linear(queries, weight_q, bias_q), *F.linear(context, weight_kv, bias_kv).chunk(2, -1)


class Attention(nn.Module):
    """Attention of several heads, with the tokens that ask apart from those that are asked."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.attend_packed = BACKENDS[backend], PACKED.get(backend)
        self.qkv = QKV(width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor | None = None) -> Tensor:
        """queries (S, M, D) look at context (S, T, D), or at each other -> (S, M, D)."""
        parts = self.qkv(queries, context)
        if context is None:
            (packed,) = parts
            if self.attend_packed is not None and not torch.compiler.is_compiling():
                return self.proj(self.attend_packed(packed, self.heads))
            parts = packed.chunk(3, -1)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in parts)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, under the names of timm's (whose import takes seconds)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """A pre-norm block as MAE and timm's ViT have them: biased qkv, an MLP of width `mlp` (4 x width), GELU."""

    def __init__(self, width: int, heads: int, backend: str, mlp: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, backend)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp or 4 * width)

    def forward(self, tokens: Tensor, context: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """tokens (S, M, D) look at context (S, T, D), or at each other -> (S, M, D).

        `keep` (S, 2) multiplies what attention and MLP add to each sequence (drop path).
        """
        around = None if context is None else self.norm1(context)
        attended = self.attn(self.norm1(tokens), around)
        tokens = tokens + (attended if keep is None else attended * keep[:, :1, None])
        added = self.mlp(self.norm2(tokens))
        return tokens + (added if keep is None else added * keep[:, 1:, None])


def run_blocks(
    blocks: nn.ModuleList,
    tokens: Tensor,
    checkpointing: Checkpointing,
    *,
    first: int = 0,
    context: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """tokens (B, N, T, D) through every block, each view a sequence of its own -> (B, N, T - first, D).

    The tokens look at each other, or at `context` (B, N, C, D), which stays as it is. Those before `first` are not
    asked for: what nobody reads of the last block (queries, projection and MLP of theirs) is not computed. `keep`
    (B N, blocks, 2) multiplies what each block's attention and MLP add to a sequence: 0, or 1 / (1 - rate) where the
    path is kept, with drop path; None: 1.
    """
    flat = tokens.flatten(0, 1)
    # Contiguous once, where every block's norm would copy it.
    around = None if context is None else context.flatten(0, 1).contiguous()
    for i, block in enumerate(blocks):
        kept = None if keep is None else keep[:, i].to(flat.dtype)
        if first and block is blocks[-1]:
            flat, around = flat[:, first:], flat
        flat = call(block, checkpointing, flat, around, kept)
    return flat.unflatten(0, tokens.shape[:2])
