"""The order of an epoch and how it is dealt: exactly once, and the same for every number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimae.data import DataError
from mimae.data.order import Plan, epoch_order
from mimae.kernels import philox4x32

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(0, 10_000), st.integers(1, 400))
def test_order_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert torch.equal(epoch_order(seed, epoch, n).sort().values, torch.arange(n))


def test_order_sorts_by_unsigned_key() -> None:
    """Against Python's unbounded integers: half of the keys have the top bit set, int64's sign."""
    n, seed, epoch = 500, 77, 3
    keys = []
    for i in range(n):
        block, word, id_low, id_high = map(torch.tensor, (4 << 24, epoch, i, 0))
        first, second, *_ = map(int, philox4x32((block, word, id_low, id_high), (seed, 0)))
        keys.append((first << 32 | second, i))
    assert max(keys)[0] >= 1 << 63
    assert epoch_order(seed, epoch, n).tolist() == [i for _, i in sorted(keys)]


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [(0, 0, [6, 9, 2, 7, 0, 5, 4, 8, 3, 1]), (4_000_000_000, 7, [3, 2, 5, 9, 7, 6, 8, 4, 0, 1])],
)
def test_known_orders(seed: int, epoch: int, order: list[int]) -> None:
    """Frozen: a run that a later version resumes must see what it has not seen yet."""
    assert epoch_order(seed, epoch, 10).tolist() == order


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(samples, batch_size, accumulate, world_size) that divide."""
    accumulate, world_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    batch_size = accumulate * world_size * draw(st.integers(1, 4))
    return draw(st.integers(batch_size, 5 * batch_size)), batch_size, accumulate, world_size


@given(plans(), SEEDS)
def test_global_batch_is_the_same_for_every_deal(plan: tuple[int, int, int, int], seed: int) -> None:
    """Step s is positions [s G, (s + 1) G) of the order, in order over micro-batches and then ranks."""
    samples, batch_size, accumulate, world_size = plan
    order = epoch_order(seed, 1, samples)
    ranks = [Plan(samples, batch_size, accumulate, rank, world_size) for rank in range(world_size)]
    dealt = [list(rank.jobs(order, 1)) for rank in ranks]
    assert {len(jobs) for jobs in dealt} == {samples // batch_size * accumulate}
    seen = np.concatenate([job.ids for micro in zip(*dealt, strict=True) for job in micro])
    assert seen.tolist() == order[: len(seen)].tolist()
    assert [job.step for job in dealt[0]] == [s for s in range(samples // batch_size) for _ in range(accumulate)]
    assert np.concatenate([seen, ranks[0].dropped(order)]).tolist() == order.tolist()
    assert len(ranks[0].dropped(order)) < batch_size


@given(plans(), st.data())
def test_resuming_gives_the_rest(plan: tuple[int, int, int, int], data: st.DataObject) -> None:
    samples, batch_size, accumulate, world_size = plan
    order = epoch_order(5, 2, samples)
    whole = Plan(samples, batch_size, accumulate, world_size - 1, world_size)
    first = data.draw(st.integers(0, whole.steps_per_epoch))
    rest = [job.ids.tolist() for job in whole.jobs(order, 2, first)]
    assert rest == [job.ids.tolist() for job in whole.jobs(order, 2)][first * accumulate :]


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(DataError, match=r"schedule.batch_size = 30 .* 4 ranks x 2 micro-batches.* multiple of 8"):
        Plan(100, 30, accumulate=2, rank=0, world_size=4)


def test_fewer_samples_than_a_batch() -> None:
    with pytest.raises(DataError, match=r"epoch of 31 samples has no full batch of 32.* at most 31"):
        Plan(31, 32, accumulate=1, rank=0, world_size=1)
