"""Tests of what DistributedDataParallel needs from a model."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimae import distributed
from mimae.engines.ddp import _fix_strides

MAPS = torch.rand(16, 16, 28, 28).contiguous(memory_format=torch.channels_last)
"""Maps with their channels last. For at least 16 of them torch's convolutions on a CPU take another way."""


def gradient(fixes: bool, wraps: bool = False) -> Tensor:
    """Return the gradient of a convolution of one pixel on the maps."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 3, 1)
    if fixes:
        _fix_strides(conv)
    module = DistributedDataParallel(conv, gradient_as_bucket_view=True) if wraps else conv
    module(MAPS).square().sum().backward()
    assert conv.weight.grad is not None
    return conv.weight.grad


def said_of_strides(fixes: bool, expected: Tensor) -> list[str]:
    """Return DistributedDataParallel's warnings about strides; it must give the gradient `expected`."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert torch.equal(gradient(fixes, wraps=True), expected)
    return [text for each in warned if "strides" in (text := str(each.message))]


def test_gradients_of_1_x_1_convolutions_have_the_strides_of_ddps_buckets() -> None:
    plain, fixed = gradient(fixes=False), gradient(fixes=True)
    assert fixed.stride() == (16, 1, 1, 1) and torch.equal(fixed, plain)
    if plain.stride() == fixed.stride():
        pytest.skip("torch gives them these strides here by itself")
    distributed.setup()
    torch.set_warn_always(True)
    try:
        assert said_of_strides(fixes=False, expected=plain), "there is something to fix"
        assert said_of_strides(fixes=True, expected=plain) == []
    finally:
        torch.set_warn_always(False)
        distributed.shutdown()
