"""How far rounding alone may move results in fp32: measured by moving the weights by their last bit, not guessed.

Sums in another order (on other ranks, in another kernel, on another processor) round otherwise, and how much of that a
result shows depends on its condition: a small difference of large sums, as CLUB is, shows a hundred times what a sum of
squares does. A run from weights that differ in their last bit shows as much: results move by their condition, and the
rounding inside is drawn anew. A right result may be off by `FACTOR` times the farthest of several such runs. No number
here comes from a processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 8
"""Runs on moved weights, each with other ones moved."""

FACTOR = 4
"""Right results are as far off as the farthest of eight such runs, at most; a wrong gradient is hundreds of times as
far."""

Values = Mapping[str, Tensor]


@torch.no_grad()
def nudge(weights: Iterable[Tensor], draw: int, dtype: torch.dtype = torch.float32) -> None:
    """Moves each element up or down by about the last bit that it has in `dtype`, or leaves it as it is, in place."""
    generator = torch.Generator().manual_seed(draw)
    for weight in weights:
        bits = torch.randint(-1, 2, weight.shape, generator=generator)
        weight.mul_(1 + torch.finfo(dtype).eps * bits.to(weight))


def excess(got: Values, want: Values, nudged: Sequence[Values]) -> float:
    """The largest distance of two tensors of a name, in units of the distance that rounding explains: that of `nudged`,
    which are the same results of `want`'s program on moved weights, or a few last bits of a result that did not move.
    Above 1 the results differ."""
    assert got.keys() == want.keys() and all(each.keys() == want.keys() for each in nudged)
    return max(_excess(got[name], want[name], [each[name] for each in nudged]) for name in want)


def _excess(got: Tensor, want: Tensor, nudged: list[Tensor]) -> float:
    assert got.shape == want.shape
    distance = torch.dist(got.double(), want.double()).item()
    explained = max(torch.dist(each.double(), want.double()).item() for each in nudged)
    explained += torch.finfo(want.dtype).eps * want.double().norm().item()
    return distance / (FACTOR * explained) if distance else 0.0
