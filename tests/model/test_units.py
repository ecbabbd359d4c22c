"""Tests of weights that do not fit a model: each kind of difference is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mimae.model.units import fill


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.ones(2, 3)}, "bias is missing"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "gain": torch.ones(2)}, "the model has no gain"),
        (
            {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
            r"weight has the shape \(2, 4\), and the model needs \(2, 3\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_memory_is_taken(tensors: dict[str, Tensor], said: str) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"^{said}$"):
        fill(model, tensors, "cpu")
    assert model.weight.is_meta
