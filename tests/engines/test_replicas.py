"""Tests of the comparison of copies: differing copies are reported by rank and name, equal copies are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mimae import distributed
from mimae.engines.replicas import DivergenceError, checksum, differences
from mimae.engines.zero import ZeroEngine
from mimae.train.tasks.pretrain import engine_of
from tests.engines.test_engines import recipe, train
from tests.rank_processes import run_ranks

KINDS = {
    "ddp": ["engine.kind=ddp"],
    "zero1": ["engine.kind=zero1"],
    "zero3": ["engine.kind=zero3"],
    "fsdp, replicas": ["engine.kind=fsdp", "engine.replicas=2"],
    "fsdp": ["engine.kind=fsdp"],
}
NAME = "encoder.blocks.1.mlp.fc2.weight"


def told(overrides: list[str]) -> list[str]:
    """Return the errors after a step, and after flipping one bit of a weight and of an average on the last rank."""
    settings = recipe(*overrides)
    engine = engine_of(settings, torch.device("cpu"))
    train(engine, settings, range(1))
    flipped = [torch.zeros(1)]
    if distributed.rank() == distributed.world_size() - 1:
        whole = isinstance(engine, ZeroEngine) and not engine.is_spread
        weight = dict(engine.model.named_parameters())[NAME] if whole else engine.parts[NAME].values
        flipped += [weight, engine.ema[NAME]]
    else:
        flipped += [torch.zeros(1), torch.zeros(1)]
    found = []
    for tensor in flipped:
        bits = tensor.detach().view(torch.int32).view(-1)[:1]
        bits ^= 1
        try:
            engine.check_copies()
            found.append("")
        except DivergenceError as error:
            found.append(str(error))
        bits ^= 1
    return found


def every_kind() -> dict[str, list[str]]:
    return {kind: told(overrides) for kind, overrides in KINDS.items()}


def test_one_bit_of_a_copy_is_told_on_every_rank(tmp_path: Path) -> None:
    """Tensors that only one rank holds have no copy: weights of fsdp and zero3, averages of zero1."""
    ranks = run_ranks(2, tmp_path, every_kind)
    assert ranks[0] == ranks[1]
    for kind in KINDS:
        silent, of_weight, of_average = ranks[0][kind]
        has_copies = kind in ("ddp", "zero1", "fsdp, replicas")
        assert not silent
        assert ("of the copies on ranks 0, 1 those on 1 differ from those on 0" in of_weight) == has_copies
        assert of_weight.endswith(f" tensors: {NAME}") == has_copies
        assert of_average.endswith(f" tensors: ema.{NAME}") == (kind in ("ddp", "fsdp, replicas"))


def test_the_minority_is_named_within_its_shard() -> None:
    """Ranks 0, 2, 4 hold one shard, and 1, 3, 5 another. Rank 4 differs in two tensors; 1, 3 and 5 agree."""
    sums = torch.tensor([[1, 2, 3], [7, 8, 9]]).repeat(3, 1)
    assert not differences(sums, [0, 1] * 3, ["a", "b", "c"])
    sums[4, 1:] = 0
    assert differences(sums, [0, 1] * 3, ["a", "b", "c"]) == (
        "of the copies on ranks 0, 2, 4 those on 4 differ from those on 0, 2 in 2 of 3 tensors: b, c"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_checksum_is_of_all_bits_and_of_no_order(dtype: torch.dtype) -> None:
    """Bits are compared, not numbers: zeros of different sign differ, and equal NaNs agree."""
    tensor = torch.arange(1000).to(dtype).view(10, 100)
    assert checksum(tensor) == checksum(tensor.T) == checksum(tensor.flatten().flip(0))
    assert checksum(tensor) != checksum(torch.where(tensor == 7, 8, tensor))
    if dtype.is_floating_point:
        assert checksum(torch.tensor(0.0, dtype=dtype)) != checksum(torch.tensor(-0.0, dtype=dtype))
        assert checksum(torch.tensor(float("nan"), dtype=dtype)) == checksum(torch.tensor(float("nan"), dtype=dtype))
