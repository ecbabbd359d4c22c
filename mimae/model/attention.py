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


def obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_widths: Iterable[int]) -> str | None:
    """Why a backend cannot train heads of these widths here, in words; None where it can: it has just done so."""
    try:
        for width in head_widths:
            qkv = torch.ones(3, 1, 2, 16, width, device=device, dtype=dtype, requires_grad=True)
            BACKENDS[backend](*qkv.unbind(0)).sum().backward()
    except Exception as error:  # whatever a foreign backend raises is the reason
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
