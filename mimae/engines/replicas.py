"""Copies on several ranks are compared, so that what drifted apart in silence does not become a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from mimae import distributed

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

TOLD = 3
"""Tensors that an error names."""


class DivergenceError(RuntimeError):
    """Ranks differ in what should be the same. No mistake of the user's: the run goes on from its last checkpoint."""


def compare(tensors: Mapping[str, Tensor], shard: int) -> None:
    """Raise DivergenceError on every rank where ranks of the same `shard` hold other `tensors`: by name, the same
    names on all ranks. A collective; by the sum of all bits, which sees every single change."""
    mine = torch.stack([torch.tensor(shard), *(checksum(tensor).cpu() for tensor in tensors.values())])
    everyone = distributed.all_gather(mine[None])
    if told := differences(everyone[:, 1:], everyone[:, 0].tolist(), list(tensors)):
        raise DivergenceError(told)


def checksum(tensor: Tensor) -> Tensor:
    """int64 (): the sum of a tensor's bits, taken as integers, modulo 2^64; on the tensor's device."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def differences(sums: Tensor, shards: list[int], names: list[str]) -> str:
    """Return a report on checksums (ranks, tensors) and the shards of the ranks; empty where all agree."""
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
