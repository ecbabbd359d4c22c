"""The rule for accuracy: an error against float64 of at most twice plain PyTorch's error in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Device on which fused kernels run: the GPU, or the CPU with triton's interpreter."""

SLACK = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Additional allowed error, as a share of a result's scale. It is a few last bits, because plain PyTorch is sometimes
exact by chance."""


def assert_as_accurate(
    fused: Tensor | Sequence[Tensor],
    plain: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    scales: Sequence[Tensor | float | None] | None = None,
) -> None:
    """Compare the results of a fused op, in order, with plain PyTorch's in the same dtype and with those in float64.

    `fused` has to have the shapes and dtypes of `plain`. The slack is that of its dtype. The scale of a result is its
    largest exact value. If a result has only a few numbers that are small sums of large terms, this value does not
    reflect rounding, and plain PyTorch's error is random: then `scales` has the sum of the absolute values of the
    terms.
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
