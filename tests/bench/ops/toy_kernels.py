"""Kernels to compile in fresh processes.

They are small ones whose traffic and machine code are known, and a form of `infonce` that the benches do not compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mimae.bench.ops.offline import Binary, compiled
from mimae.kernels import infonce
from mimae.kernels.runtime import Launch, Target, jit, launch, tl, watching


@jit
def copy(source, target, count, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute target[i] = source[i step]; with a step other than 1, accesses are one element wide."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    tl.store(target + places, tl.load(source + places * step, mask=inside), mask=inside)


@jit
def copy_reading_twice(source, target, count, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy like `copy`, and read the neighbour's element a second time."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    values = tl.load(source + places * step, mask=inside)
    others = tl.load(source + ((places + BLOCK) % count) * step, mask=inside)
    tl.store(target + places, values + 0 * others, mask=inside)


@jit
def product(left, right, out, SIDE: tl.constexpr, INNER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute one SIDE x SIDE tile of a matrix product in a single block; with few warps the registers spill."""
    rows, inner = tl.arange(0, SIDE), tl.arange(0, 64)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for first in range(0, INNER, 64):
        a = tl.load(left + rows[:, None] * INNER + first + inner[None, :])
        b = tl.load(right + rows[None, :] * INNER + first + inner[:, None])
        total = tl.dot(a, b, total)
    tl.store(out + rows[:, None] * SIDE + rows[None, :], total)


def run_copy(kernel: Any, source: Tensor, step: int = 1, block: int = 1024) -> Tensor:
    """Copy every `step`-th element of a vector."""
    count = source.numel() // step
    target = torch.empty(count, dtype=source.dtype, device=source.device)
    launch(kernel, (-(-count // block),), source=source, target=target, count=count, step=step, BLOCK=block)
    return target


def compile_copy(start: int, capability: int) -> Binary:
    """Return `copy` of 2^20 bf16 from index `start` on; an odd index is not aligned to 16 bytes."""
    source = torch.empty((1 << 20) + 64, dtype=torch.bfloat16, device="meta")[start : start + (1 << 20)]
    return _compiled(lambda: run_copy(copy, source), capability)


def compile_product(side: int, warps: int, capability: int) -> Binary:
    """Return `product` of bf16 with an inner dimension of 768."""
    left, right = (torch.empty(side, 768, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out = torch.empty(side, side, dtype=torch.float32, device="meta")
    tile = {"SIDE": side, "INNER": 768}
    return _compiled(lambda: launch(product, (1,), warps=warps, out=out, left=left, right=right, **tile), capability)


def compile_infonce_of_a_rank(rows: int, width: int, dtype: torch.dtype, target: Target) -> list[Binary]:
    """Return the kernels of `infonce` for one rank's rows out of 4,096 images with 4 views."""
    u, tau, lse = (torch.empty(shape, device="meta") for shape in ((4096, 4, width), (1,), (4096, 4, 4)))
    u, seen = u.to(dtype), list[Launch]()
    with watching(seen.append, target):
        infonce.launch_forward(u[:rows], u, 0, tau)
        infonce.launch_backward(u[:rows], u, 0, tau, lse)
    return [compiled(each, target.capability) for each in seen]


def _compiled(run: Callable[[], object], capability: int) -> Binary:
    seen: list[Launch] = []
    with watching(seen.append):
        run()
    return compiled(seen[0], capability)
