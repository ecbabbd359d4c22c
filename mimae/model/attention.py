"""Backends of softmax attention: a function each, and why one cannot run.

All compute softmax(q k^T / sqrt(d)) v. `auto` is torch's own until a run has chosen, see `attention_choice`.

Letters in shapes: S sequences, H heads, M tokens that ask, T tokens that are asked, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (S, H, M, d), k and v (S, H, T, d) -> (S, H, M, d)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, which chooses between its flash, memory-efficient and plain forms."""
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products with a softmax between them. In bf16 the scores are rounded, and autograd keeps the weights."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1, dtype=q.dtype) @ v


class _PackedPlain(torch.autograd.Function):
    """`plain` of a packed (S, T, 3 H d), whose gradient is packed too.

    Each of the two is copied once between its layout and that of the products. Autograd's own backward would copy the
    three gradients out of their layout, and then once more into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, heads: int) -> Tensor:
        S, T, d = packed.shape[0], packed.shape[1], packed.shape[2] // (3 * heads)
        qkv = packed.view(S, T, 3, heads, d).permute(2, 0, 3, 1, 4).reshape(3, S * heads, T, d)
        q, k, v = qkv.unbind(0)
        weights = _scores(q, k).softmax(-1, dtype=q.dtype)
        ctx.heads = heads
        ctx.save_for_backward(qkv, weights)
        return torch.bmm(weights, v).view(S, heads, T, d).transpose(1, 2).reshape(S, T, heads * d)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        qkv, weights = ctx.saved_tensors
        (q, k, v), (S, T, width) = qkv.unbind(0), d_out.shape
        d_out = d_out.view(S, T, ctx.heads, -1).transpose(1, 2).reshape(S * ctx.heads, T, -1)
        d_qkv = torch.empty_like(qkv)
        torch.bmm(weights.transpose(1, 2), d_out, out=d_qkv[2])
        d_weights = torch.bmm(d_out, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(q.shape[-1] ** -0.5)
        torch.bmm(d_scores, k, out=d_qkv[0])
        torch.bmm(d_scores.transpose(1, 2), q, out=d_qkv[1])
        return d_qkv.view(3, S, ctx.heads, T, -1).permute(1, 3, 0, 2, 4).reshape(S, T, 3 * width), None


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q, k (S H, T, d) -> q k^T / sqrt(d)."""
    return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def packed_plain(packed: Tensor, heads: int) -> Tensor:
    """Queries, keys and values (S, T, 3 H d) of one set of tokens -> (S, T, H d)."""
    return _PackedPlain.apply(packed, heads)  # type: ignore[no-untyped-call]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's fused attention, which torch's own choice ranks last."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' memory-efficient attention; its heads lie behind the tokens."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's FlexAttention: fused on a GPU, by a compiled block around it or by itself; forward only on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    alone = q.is_cuda and not torch.compiler.is_compiling()
    return _compiled(flex_attention)(q, k, v) if alone else flex_attention(q, k, v)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


BACKENDS: dict[str, Attend] = {
    "auto": sdpa,
    "sdpa": sdpa,
    "plain": plain,
    "cudnn": cudnn,
    "xformers": xformers,
    "flex": flex,
}

PACKED: dict[str, Callable[[Tensor, int], Tensor]] = {"plain": packed_plain}
"""Backends that take queries, keys and values of one set of tokens in one tensor: (S, T, 3 H d), H -> (S, T, H d).

They are for blocks that run operator by operator; the compiler sees the copies itself."""


def obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_widths: Iterable[int]) -> str | None:
    """Why a backend cannot train heads of these widths here, in words; None where it can: it has just done so."""
    try:
        for width in head_widths:
            qkv = torch.ones(3, 1, 2, 16, width, device=device, dtype=dtype, requires_grad=True)
            BACKENDS[backend](*qkv.unbind(0)).sum().backward()
    except Exception as error:  # whatever a foreign backend raises is the reason
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
