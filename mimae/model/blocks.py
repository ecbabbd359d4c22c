"""The transformer block of encoder and decoder. Its parameters have timm's names, and it can compute some tokens only.

Letters in shapes: S sequences, M queries (tokens), T keys (tokens), D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimae.model.attention import BACKENDS, PACKED
from mimae.model.recomputation import call
from mimae.model.settings import ModelSettings, Residual


class QKV(nn.Linear):
    """A projection to queries, keys and values with one weight (3D, D), for one set of tokens or for two."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, queries: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return q (S, M, D), and k and v (S, T, D), for queries (S, M, D) and context (S, T, D).

        Without a context return one tensor (S, M, 3D), which holds q, k and v of the queries.
        """
        if context is None:
            return (super().forward(queries),)
        parts = [self.in_features, 2 * self.in_features]
        (weight_q, weight_kv), (bias_q, bias_kv) = self.weight.split(parts), self.bias.split(parts)
        return F.linear(queries, weight_q, bias_q), *F.linear(context, weight_kv, bias_kv).chunk(2, -1)


class Attention(nn.Module):
    """Multi-head attention. Queries and keys may come from different sets of tokens."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.attend_packed = BACKENDS[backend], PACKED.get(backend)
        self.qkv = QKV(width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor | None = None) -> Tensor:
        """Return (S, M, D): the queries (S, M, D) attend to the context (S, T, D), or to each other if it is None."""
        parts = self.qkv(queries, context)
        if context is None:
            (packed,) = parts
            if self.attend_packed is not None and not torch.compiler.is_compiling():
                return self.proj(self.attend_packed(packed, self.heads))
            parts = packed.chunk(3, -1)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in parts)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between them. The names are those of timm's class, whose import takes seconds."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class _NormOfRounded(torch.autograd.Function):
    """LayerNorm in the dtype of the weights for tokens of a smaller dtype. It keeps the tokens, and no converted copy.

    torch's own operator would keep such a copy under a GPU's autocast. On a CPU it would add up the gradients of weight
    and bias in the dtype of the tokens.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(tokens.to(weight.dtype), weight.shape, weight, bias, eps)
        ctx.save_for_backward(tokens, mean, rstd, weight, bias)
        return out.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, mean, rstd, weight, bias = ctx.saved_tensors
        d_out, wide = d_out.to(weight.dtype), tokens.to(weight.dtype)
        asked = ctx.needs_input_grad[:3]
        d_wide, *d_parameters = torch.ops.aten.native_layer_norm_backward(
            d_out, wide, weight.shape, mean, rstd, weight, bias, asked
        )
        return None if d_wide is None else d_wide.to(tokens.dtype), *d_parameters, None


class Norm(nn.LayerNorm):
    """A LayerNorm whose result has the dtype of the tokens, while it computes in the dtype of its weights."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise tokens (..., D)."""
        if tokens.dtype == self.weight.dtype:
            return super().forward(tokens)
        return _NormOfRounded.apply(tokens, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]


class Block(nn.Module):
    """A pre-norm block as in MAE and timm's ViT: qkv with bias, GELU, an MLP of width `mlp` (default: 4 x width)."""

    def __init__(self, width: int, heads: int, backend: str, mlp: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = Norm(width, eps=eps)
        self.attn = Attention(width, heads, backend)
        self.norm2 = Norm(width, eps=eps)
        self.mlp = Mlp(width, mlp or 4 * width)

    def forward(self, tokens: Tensor, context: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Return (S, M, D): the tokens (S, M, D) attend to the context (S, T, D), or to each other if it is None.

        `keep` (S, 2) scales the outputs of attention and MLP before they are added to each sequence (drop path).
        """
        around = None if context is None else self.norm1(context)
        attended = self.attn(self.norm1(tokens), around)
        tokens = tokens + (attended if keep is None else attended * keep[:, :1, None])
        added = self.mlp(self.norm2(tokens))
        return tokens + (added if keep is None else added * keep[:, 1:, None])


def as_stream(tokens: Tensor, residual: Residual) -> Tensor:
    """Return the tokens in the dtype of the residual stream: bf16 under autocast if the settings ask for it.

    Each block adds bf16 numbers to the stream, so its output has the dtype of its input. Without autocast everything
    is computed in the dtype of the weights.
    """
    device = tokens.device.type
    if residual == "fp32" or not torch.is_autocast_enabled(device):
        return tokens
    return tokens.to(torch.get_autocast_dtype(device))


def run_blocks(
    blocks: nn.ModuleList,
    tokens: Tensor,
    settings: ModelSettings,
    *,
    first: int = 0,
    context: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Return (B, N, T - first, D): the tokens (B, N, T, D) after every block. Each view is a separate sequence.

    The tokens attend to each other, or to `context` (B, N, C, D), which no block changes. The last block computes
    outputs only for the tokens from `first` on; queries, projection and MLP of the others are left out. `keep`
    (B N, blocks, 2) scales the outputs of each block's attention and MLP (drop path): 0 if the path is dropped, else
    1 / (1 - rate). None means 1 everywhere. The result has the dtype of the tokens.
    """
    flat = as_stream(tokens.flatten(0, 1), settings.residual)
    # Make it contiguous once; otherwise the norm of every block would copy it.
    around = None if context is None else as_stream(context.flatten(0, 1), settings.residual).contiguous()
    for i, block in enumerate(blocks):
        kept = None if keep is None else keep[:, i].to(flat.dtype)
        if first and block is blocks[-1]:
            flat, around = flat[:, first:], flat
        flat = call(block, settings.checkpointing, flat, around, kept)
    return flat.to(tokens.dtype).unflatten(0, tokens.shape[:2])
