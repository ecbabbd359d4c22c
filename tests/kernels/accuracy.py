"""What counts as accurate: an error against float64 of at most twice plain PyTorch's in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where fused kernels run: on the GPU, or on the CPU under triton's interpreter."""

SLACK = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""What is granted beyond twice plain PyTorch's error, as a share of the largest exact value: about an ulp, since plain
PyTorch is exact now and then by luck."""


def assert_as_accurate(
    fused: Tensor | Sequence[Tensor], plain: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]
) -> None:
    """Holds the results of a fused op, in order, against plain PyTorch's in the same dtype and those of float64.

    `fused` has to have the shapes and dtypes of `plain`; the slack is that of its dtype.
    """
    results = [[each] if isinstance(each, Tensor) else list(each) for each in (fused, plain, exact)]
    for place, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        assert ours.shape == theirs.shape == truth.shape, f"result {place}: {ours.shape}, {theirs.shape}, {truth.shape}"
        assert ours.dtype == theirs.dtype, f"result {place}: {ours.dtype}, plain PyTorch has {theirs.dtype}"
        assert truth.dtype == torch.float64
        truth = truth.to(ours.device)
        error, allowed = ((each.double() - truth).abs().max().item() for each in (ours, theirs))
        bound = 2 * allowed + SLACK[ours.dtype] * truth.abs().max().item()
        assert error <= bound, f"result {place}: error {error:.3e}, plain PyTorch {allowed:.3e}, bound {bound:.3e}"
