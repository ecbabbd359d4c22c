"""The order of an epoch and its distribution: each sample exactly once, for every number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimae.data.loading import order as order_module
from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Plan, Share, epoch_order, spread_ids
from mimae.kernels import philox4x32

SEEDS = st.integers(0, 2**32 - 1)


def one(n: int) -> list[Share]:
    """Return the shares of a plain source: one share, drawn completely in each epoch."""
    return [Share(n, n, np.array([0, n]))]


@given(SEEDS, st.integers(0, 10_000), st.integers(1, 400))
def test_order_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert torch.equal(epoch_order(seed, epoch, one(n)).sort().values, torch.arange(n))


def test_order_sorts_by_unsigned_key() -> None:
    """The order equals one with Python's unbounded integers. Half of the keys have int64's sign bit set."""
    n, seed, epoch = 500, 77, 3
    keys = []
    for i in range(n):
        block, word, id_low, id_high = map(torch.tensor, (4 << 24, epoch, i, 0))
        first, second, *_ = map(int, philox4x32((block, word, id_low, id_high), (seed, 0)))
        keys.append((first << 32 | second, i))
    assert max(keys)[0] >= 1 << 63
    assert epoch_order(seed, epoch, one(n)).tolist() == [i for _, i in sorted(keys)]


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [(0, 0, [6, 9, 2, 7, 0, 5, 4, 8, 3, 1]), (4_000_000_000, 7, [3, 2, 5, 9, 7, 6, 8, 4, 0, 1])],
)
def test_known_orders(seed: int, epoch: int, order: list[int]) -> None:
    """These orders are frozen: a run that a later version resumes must see exactly the remaining samples."""
    assert epoch_order(seed, epoch, one(10)).tolist() == order


# Blocks


@st.composite
def blocked(draw: st.DrawFn) -> Share:
    """Return the shares of a source with uneven blocks, some of them empty."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return Share(int(ends[-1]), int(ends[-1]), ends)


@pytest.fixture(params=[1, 7, 1000], ids=["a block a group", "several blocks a group", "one group"])
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(order_module, "GROUP", request.param)
    return int(request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocked(), SEEDS, st.integers(0, 5))
def test_blocks_are_read_together(group: int, share: Share, seed: int, epoch: int) -> None:
    """Each sample occurs once, and the samples of a block are spread over at most the size of its group."""
    order = epoch_order(seed, epoch, [share], by_blocks=True)
    assert order.sort().values.tolist() == list(range(share.samples))
    place = order.argsort().numpy()
    for begin, end in itertools.pairwise(share.blocks):
        if begin < end:
            assert np.ptp(place[begin:end]) < group + np.diff(share.blocks).max()


def test_one_group_is_the_full_order() -> None:
    share = Share(60, 60, np.arange(0, 61, 12))
    assert torch.equal(epoch_order(3, 1, [share], by_blocks=True), epoch_order(3, 1, [share]))


def test_blocks_and_samples_are_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the epochs every block comes first once, and samples change their place within their block."""
    monkeypatch.setattr(order_module, "GROUP", 1)
    share = Share(40, 40, np.arange(0, 41, 10))
    orders = [epoch_order(0, epoch, [share], by_blocks=True).view(4, 10) for epoch in range(30)]
    assert {int(order[0, 0]) // 10 for order in orders} == {0, 1, 2, 3}
    assert all((order // 10 == order[:, :1] // 10).all() for order in orders)
    assert len({tuple((order[0] % 10).tolist()) for order in orders}) == 30


def test_known_order_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These orders are frozen too."""
    monkeypatch.setattr(order_module, "GROUP", 4)
    share = Share(10, 10, np.array([0, 3, 5, 10]))
    assert epoch_order(1, 2, [share], by_blocks=True).tolist() == [3, 4, 0, 1, 2, 8, 6, 9, 7, 5]


# Mixtures


@st.composite
def mixtures(draw: st.DrawFn) -> list[Share]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    return [Share(n, draw(st.integers(1, 30)), np.array([0, n])) for n in sizes]


@settings(max_examples=40)
@given(mixtures(), SEEDS, st.booleans())
def test_every_pass_over_a_share_is_whole(shares: list[Share], seed: int, by_blocks: bool) -> None:
    """The draws of a share, concatenated over epochs, are its passes: each sample occurs once in each pass."""
    total, epochs = sum(share.samples for share in shares), 5
    drawn = np.concatenate([epoch_order(seed, epoch, shares, by_blocks=by_blocks) for epoch in range(epochs)]) % total
    first = 0
    for share in shares:
        own = drawn[(drawn >= first) & (drawn < first + share.samples)]
        assert len(own) == epochs * share.draws
        passes = [own[at : at + share.samples] for at in range(0, len(own), share.samples)]
        assert all(len(set(one)) == len(one) for one in passes)
        assert all(sorted(one) == list(range(first, first + share.samples)) for one in passes[:-1])
        first += share.samples


@given(mixtures(), SEEDS, st.integers(0, 4))
def test_slots_of_an_epoch_differ(shares: list[Share], seed: int, epoch: int) -> None:
    """A sample that is repeated in an epoch has another slot, so another crop and other masks."""
    slots = epoch_order(seed, epoch, shares)
    assert len(slots.unique()) == len(slots) == sum(share.draws for share in shares)


def test_parts_are_spread_evenly() -> None:
    """With weights of three to one, any 8 consecutive draws have 6 and 2, so that batches follow the weights."""
    shares = [Share(100, 60, np.array([0, 100])), Share(7, 20, np.array([0, 7]))]
    of_second = epoch_order(0, 3, shares).view(10, 8) % 107 >= 100
    assert of_second.sum(1).tolist() == [2] * 10


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Draw (samples, batch_size, accumulate, world_size) that divide evenly."""
    accumulate, world_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    batch_size = accumulate * world_size * draw(st.integers(1, 4))
    return draw(st.integers(batch_size, 5 * batch_size)), batch_size, accumulate, world_size


@given(plans(), SEEDS)
def test_global_batch_is_the_same_for_every_deal(plan: tuple[int, int, int, int], seed: int) -> None:
    """Step s has positions [s G, (s + 1) G) of the order, in order over micro-batches and then ranks."""
    samples, batch_size, accumulate, world_size = plan
    order = epoch_order(seed, 1, one(samples))
    ranks = [Plan(samples, batch_size, accumulate, rank, world_size) for rank in range(world_size)]
    dealt = [list(rank.requests(order, 1)) for rank in ranks]
    assert {len(requests) for requests in dealt} == {samples // batch_size * accumulate}
    seen = np.concatenate([request.ids for micro in zip(*dealt, strict=True) for request in micro])
    assert seen.tolist() == order[: len(seen)].tolist()
    assert [request.step for request in dealt[0]] == [
        s for s in range(samples // batch_size) for _ in range(accumulate)
    ]
    assert np.concatenate([seen, ranks[0].dropped(order)]).tolist() == order.tolist()
    assert len(ranks[0].dropped(order)) < batch_size


@given(plans(), st.data())
def test_resuming_gives_the_rest(plan: tuple[int, int, int, int], data: st.DataObject) -> None:
    samples, batch_size, accumulate, world_size = plan
    order = epoch_order(5, 2, one(samples))
    whole = Plan(samples, batch_size, accumulate, world_size - 1, world_size)
    first = data.draw(st.integers(0, whole.steps_per_epoch))
    rest = [request.ids.tolist() for request in whole.requests(order, 2, first)]
    assert rest == [request.ids.tolist() for request in whole.requests(order, 2)][first * accumulate :]


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(DataError, match=r"schedule.batch_size = 30 .* 4 ranks x 2 micro-batches.* multiple of 8"):
        Plan(100, 30, accumulate=2, rank=0, world_size=4)


def test_fewer_samples_than_a_batch() -> None:
    with pytest.raises(DataError, match=r"epoch of 31 samples has no full batch of 32.* at most 31"):
        Plan(31, 32, accumulate=1, rank=0, world_size=1)


@given(st.integers(1, 2**40), st.integers(1, 600))
def test_spread_ids_reach_from_the_first_to_the_last_in_equal_steps(samples: int, count: int) -> None:
    ids = spread_ids(samples, count).tolist()
    assert len(ids) == min(samples, count)
    assert ids[0] == 0 and (len(ids) == 1 or ids[-1] == samples - 1)
    steps = {after - before for before, after in itertools.pairwise(ids)}
    assert all(step >= 1 for step in steps) and (not steps or max(steps) - min(steps) <= 1)


def test_spread_ids_past_the_integers_of_float32() -> None:
    """2^24 + 4 samples: the last id, 2^24 + 3, is no float32, and the nearest one is past the end."""
    assert torch.linspace(0, 2**24 + 3, 8)[-1].long() == 2**24 + 4
    assert spread_ids(2**24 + 4, 8).tolist() == [round(k * (2**24 + 3) / 7) for k in range(8)]
