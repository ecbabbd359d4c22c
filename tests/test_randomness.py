"""Tests of the initial weights of modules in the heads of other tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mimae.randomness import initialise, materialise


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_starts_as_the_identity(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.constant_(parameter, 7.0)
    initialise(norm, 0)
    for name, parameter in norm.named_parameters():
        assert torch.equal(parameter, torch.full((8,), 1.0 if name == "weight" else 0.0))


def test_a_buffer_without_values_is_refused() -> None:
    with torch.device("meta"):
        norm = nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match=r"buffers of a BatchNorm2d have no values: running_mean, running_var"):
        materialise(norm, "cpu")
