"""FLOPs of the fused ops that contain matrix products, for torch.utils.flop_counter. A multiply-add counts as two.

Each formula takes the shapes of the op's arguments. An op without a formula counts as zero, so an op whose products the
planner has to count needs an entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Shape = Sequence[int]


def _embed_visible(images: Shape, visible: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Return the products of the visible patches (B, N, K) with the weight (D, 3, P, P)."""
    return 2 * math.prod(visible) * math.prod(weight)


def _infonce_lse(rows: Shape, columns: Shape, *_: Any, **__: Any) -> int:
    """Return the products of rows (b, N, D) and columns (B, N, D).

    A rank among many compares every ordered pair of views. If this rank has all images, one product serves two pairs.
    """
    (b, N, D), B = rows, columns[0]
    pairs = N * (N - 1) // 2 if b == B else N * (N - 1)
    return pairs * 2 * b * B * D


FLOPS: dict[str, Callable[..., int]] = {"embed_visible": _embed_visible, "infonce_lse": _infonce_lse}
"""Formulas of forward passes, by name of the op."""
