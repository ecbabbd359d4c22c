"""Tests of an epoch's sums in checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimae.telemetry.clock import Phases
from mimae.train.epoch import EpochSums, read_sums

CPU = torch.device("cpu")


def test_sums_survive_a_checkpoint() -> None:
    sums, other = EpochSums(Phases(CPU), 4), EpochSums(Phases(CPU), 4)
    sums.add({"loss": torch.tensor(2.0), "rec": torch.tensor(float("nan"))}, 8)
    other.load(sums.state(), CPU)
    other.add({"loss": torch.tensor(4.0), "rec": torch.tensor(1.0)}, 8)
    record = other.record()
    assert (record["images"], record["loss"]) == (16, 3.0) and record["rec"] != record["rec"]


@pytest.mark.parametrize(
    "broken",
    [None, 3, [], {}, {"steps": "x"}, {"steps": 1, "images": 2, "seconds": {}, "waited": 0.0, "losses": {}}],
)
def test_broken_sums_are_one_error(broken: Any) -> None:
    with pytest.raises(ValueError, match="the sums of its epoch are broken"):
        read_sums(broken)
