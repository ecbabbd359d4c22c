"""Rule for accuracy: an error against float64 of at most twice plain PyTorch's in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where fused kernels run: on the GPU, or on the CPU under triton's interpreter."""

SLACK = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Error that is granted beyond twice plain PyTorch's, as a share of a result's scale: a few last bits, since plain
PyTorch is exact now and then by luck."""


def assert_as_accurate(
    fused: Tensor | Sequence[Tensor],
    plain: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    scales: Sequence[Tensor | float | None] | None = None,
) -> None:
    """Holds the results of a fused op, in order, against plain PyTorch's in the same dtype and those of float64.

    `fused` has to have the shapes and dtypes of `plain`; the slack is that of its dtype. The scale of a result is its
    largest exact value. Where a result is one number, or a few, that are small sums of large terms, that value says
    nothing of their rounding, and plain PyTorch's own error is luck: there `scales` has the sum of the terms' absolute
    values.
    """
    results = [[each] if isinstance(each, Tensor) else list(each) for each in (fused, plain, exact)]
    given = [None] * len(results[0]) if scales is None else scales
    for place, (ours, theirs, truth, scale) in enumerate(zip(*results, given, strict=True)):
        assert ours.shape == theirs.shape == truth.shape, f"result {place}: {ours.shape}, {theirs.shape}, {truth.shape}"
        assert ours.dtype == theirs.dtype, f"result {place}: {ours.dtype}, plain PyTorch has {theirs.dtype}"
        assert truth.dtype == torch.float64
        truth = truth.to(ours.device)
        error, allowed = ((each.double() - truth).abs().max().item() for each in (ours, theirs))
        largest = torch.as_tensor(truth if scale is None else scale).abs().max().item()
        bound = 2 * allowed + SLACK[ours.dtype] * largest
        assert error <= bound, f"result {place}: error {error:.3e}, plain PyTorch {allowed:.3e}, bound {bound:.3e}"
