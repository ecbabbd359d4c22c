"""Comparison of the copies on several ranks, so that copies that silently diverged do not become a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from mimae import distributed

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

TOLD = 3
"""Maximal number of tensors that an error names."""


class DivergenceError(RuntimeError):
    """Ranks differ in tensors that should be equal.

    This is no mistake of the user: the run can continue from its last checkpoint.
    """


def compare(tensors: Mapping[str, Tensor], shard: int) -> None:
    """Raise DivergenceError on every rank if ranks of the same `shard` hold different `tensors`. This is a collective.

    All ranks have the same names. Tensors are compared by the sum of their bits as integers, which detects every change
    of a single element.
    """
    mine = torch.stack([torch.tensor(shard), *(checksum(tensor).cpu() for tensor in tensors.values())])
    everyone = distributed.all_gather(mine[None])
    if told := differences(everyone[:, 1:], everyone[:, 0].tolist(), list(tensors)):
        raise DivergenceError(told)


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements, with their bits read as integers, modulo 2^64: int64 (), same device."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def differences(sums: Tensor, shards: list[int], names: list[str]) -> str:
    """Return a report on checksums (ranks, tensors), given the shard of each rank. It is empty if all agree."""
    told = []
    for shard in dict.fromkeys(shards):
        ranks = [rank for rank, other in enumerate(shards) if other == shard]
        rows = [tuple(sums[rank].tolist()) for rank in ranks]
        usual = Counter(rows).most_common(1)[0][0]
        odd = [rank for rank, row in zip(ranks, rows) if row != usual]
        if odd:
            rest = [rank for rank in ranks if rank not in odd]
            wrong = [name for i, name in enumerate(names) if any(sums[rank, i] != usual[i] for rank in odd)]
            told.append(
                f"of the copies on ranks {_listed(ranks)} those on {_listed(odd)} differ from those on {_listed(rest)} "
                f"in {len(wrong)} of {len(names)} tensors: {', '.join(wrong[:TOLD])}{', ...' * (len(wrong) > TOLD)}"
            )
    return "; ".join(told)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
