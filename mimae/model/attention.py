"""Backends of softmax attention, one function each, and the test whether a backend runs on this machine.

All backends compute softmax(q k^T / sqrt(d)) v. `auto` is torch's own attention until the run has chosen a backend, see
`attention_choice`.

Letters in shapes: S sequences, H heads, M queries (tokens), T keys (tokens), d width of a head.
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
    """Compute attention with torch's own function, which chooses its flash, memory-efficient or plain form."""
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention as two matrix products with a softmax between them.

    In bf16 the scores are rounded. Autograd keeps the attention weights for backward.
    """
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1, dtype=q.dtype) @ v


class _PackedPlain(torch.autograd.Function):
    """The backend `plain` on a packed tensor (S, T, 3 H d), with a packed gradient.

    Input and gradient are each copied once between the packed layout and the layout of the matrix products. Autograd's
    own backward would copy the three gradients twice: out of the products' layout, and then into one tensor.
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
    """Return the scores q k^T / sqrt(d), of shape (S H, T, T), for q and k (S H, T, d)."""
    return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def packed_plain(packed: Tensor, heads: int) -> Tensor:
    """Return the attention (S, T, H d) for the packed queries, keys and values (S, T, 3 H d) of one set of tokens."""
    return _PackedPlain.apply(packed, heads)  # type: ignore[no-untyped-call]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with cuDNN's fused kernel, which `sdpa` chooses last.

    cuDNN has no kernel for fp32, in which a run in bf16 evaluates its features: there it is `sdpa`.
    """
    if q.dtype == torch.float32:
        return sdpa(q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute xformers' memory-efficient attention, which expects the layout (S, T, H, d)."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with torch's FlexAttention.

    On a GPU it is fused: it is compiled with the block around it, or separately if that block is not compiled. On a CPU
    it has no backward.
    """
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

They serve blocks that run eagerly, operator by operator. In a compiled block the compiler removes the copies of the
forward itself. There the gradients, which torch's operators return in three tensors, are still copied into one."""


def obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_widths: Iterable[int]) -> str | None:
    """Return the reason why a backend cannot train heads of these widths on `device`, or None if it can.

    The function runs a small forward and backward to find out.
    """
    if backend == "cudnn" and dtype == torch.float32:
        return "cuDNN's attention computes in bf16; use precision=bf16 or another back end"
    try:
        for width in head_widths:
            qkv = torch.ones(3, 1, 2, 16, width, device=device, dtype=dtype, requires_grad=True)
            BACKENDS[backend](*qkv.unbind(0)).sum().backward()
    except Exception as error:  # Any exception of a third-party backend is the reason.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
