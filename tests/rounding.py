"""The allowed effect of rounding on results in fp32, measured by changing the weights in their last bit.

Sums in another order (on other ranks, in another kernel, on another processor) round differently. The effect on a
result depends on its condition: for a small difference of large sums, such as CLUB, it is a hundred times as large as
for a sum of squares. A run from weights that differ in their last bit has a similar effect: results change according
to their condition, and the rounding inside changes too. A correct result may differ by `FACTOR` times the largest
change in several such runs. No number here depends on a processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 8
"""Number of runs with changed weights; each changes different ones."""

FACTOR = 4
"""Allowed distance, relative to the largest of the runs' changes. Correct results stay below 1 times that change; the
distance of a wrong gradient is hundreds of times as large."""

Values = Mapping[str, Tensor]


@torch.no_grad()
def nudge(weights: Iterable[Tensor], draw: int, dtype: torch.dtype = torch.float32) -> None:
    """Change each element in place, up or down by about its last bit in `dtype`, or not at all."""
    generator = torch.Generator().manual_seed(draw)
    for weight in weights:
        bits = torch.randint(-1, 2, weight.shape, generator=generator)
        weight.mul_(1 + torch.finfo(dtype).eps * bits.to(weight))


def excess(got: Values, want: Values, nudged: Sequence[Values]) -> float:
    """Return the largest distance of two tensors of the same name, in units of the distance that rounding explains.

    The unit is the change in `nudged`, the results of `want`'s program with changed weights, or a few last bits of a
    result that did not change. Results differ if the value is above 1.
    """
    assert got.keys() == want.keys() and all(each.keys() == want.keys() for each in nudged)
    return max(_excess(got[name], want[name], [each[name] for each in nudged]) for name in want)


def _excess(got: Tensor, want: Tensor, nudged: list[Tensor]) -> float:
    assert got.shape == want.shape
    distance = torch.dist(got.double(), want.double()).item()
    explained = max(torch.dist(each.double(), want.double()).item() for each in nudged)
    explained += torch.finfo(want.dtype).eps * want.double().norm().item()
    return distance / (FACTOR * explained) if distance else 0.0
