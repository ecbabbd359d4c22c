"""Tests that the fused masks equal plain PyTorch's bit for bit; tests/model/test_masking.py tests their properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimae.kernels import orthogonal_masks, philox_words
from mimae.kernels.orthogonal_masks import LARGEST, _orthogonal_masks
from tests.kernels.accuracy import DEVICE
from tests.kernels.mutants import Mutants, mutant_tests

SHAPES = st.integers(1, 16).flatmap(
    lambda L: st.integers(1, L).flatmap(
        lambda K: st.tuples(st.just(L), st.integers(1, L // K), st.just(K)),
    )
)


def both(seed: int, epoch: int, ids: Tensor, L: int, N: int, K: int) -> list[tuple[Tensor, Tensor]]:
    return [orthogonal_masks(seed, epoch, ids, L, N, K, impl=impl) for impl in ("triton", "reference")]  # type: ignore[arg-type]


def assert_same(seed: int, epoch: int, ids: Tensor, L: int, N: int, K: int) -> None:
    fused, plain = both(seed, epoch, ids, L, N, K)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.dtype == theirs.dtype and ours.is_contiguous()
        assert torch.equal(ours, theirs)


@given(SHAPES, st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=20)
def test_any_shape_seed_epoch_and_id(shape: tuple[int, int, int], seed: int, epoch: int, sample: int) -> None:
    """Seeds have 64 bits, signed or unsigned, ids have 64 bits, and there is one image."""
    assert_same(seed, epoch, torch.tensor([sample], device=DEVICE), *shape)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),  # one patch, none hidden
        (13, 3, 4),  # a prime L, and a patch that no view shows
        (33, 2, 16),  # one patch over a power of two
        (32, 8, 4),  # a power of two, all of it shown
    ],
)
def test_named_shapes(shape: tuple[int, int, int]) -> None:
    """Ids exceed 32 bits, are negative, and occur twice."""
    assert_same((5 << 32) + 1, 3, torch.tensor([2**40 + 1, -7, 2**40 + 1], device=DEVICE), *shape)


@pytest.mark.parametrize(
    "shape",
    [(196, 4, 49), pytest.param((257, 4, 64), marks=pytest.mark.slow)],  # ViT-B/16; patches of two warps
)
def test_real_shapes(shape: tuple[int, int, int]) -> None:
    assert_same(0, 0, torch.tensor([11], device=DEVICE), *shape)


def test_equal_words_rank_by_patch() -> None:
    """Two of the first 61 words of this stream are equal. With K = 1 every rank is visible."""
    ids = torch.tensor([1099064], device=DEVICE)
    words = philox_words(0, 1, 0, ids, 61)[0].sort().values.tolist()
    assert any(one == next_one for one, next_one in pairwise(words))
    assert_same(0, 0, ids, 61, 61, 1)


def test_ids_may_be_strided_and_of_32_bits() -> None:
    ids = torch.arange(6, device=DEVICE, dtype=torch.int32)[::2]
    assert_same(1, 2, ids, 9, 2, 3)


def test_an_empty_batch() -> None:
    visible, hidden = both(1, 2, torch.empty(0, dtype=torch.int64, device=DEVICE), 9, 2, 3)[0]
    assert visible.shape == (0, 2, 3) and hidden.shape == (0, 2, 6)


def test_larger_images_are_drawn_in_plain_pytorch() -> None:
    assert_same(1, 2, torch.arange(2, device=DEVICE), LARGEST + 1, 1, 7)


def test_mistakes_are_told() -> None:
    ids = torch.arange(2, device=DEVICE)
    with pytest.raises(ValueError, match="5 disjoint views of 4 patches need 20 patches, the image has 16"):
        orthogonal_masks(0, 0, ids, 16, 5, 4, impl="triton")
    with pytest.raises(ValueError, match="epoch -1"):
        orthogonal_masks(0, -1, ids, 16, 2, 4)


def test_the_op_is_registered_as_torch_wants_it() -> None:
    torch.library.opcheck(_orthogonal_masks, (1, 2, torch.arange(2, device=DEVICE), 9, 2, 3))


def test_compiles_in_one_graph() -> None:
    draw = torch.compile(orthogonal_masks, fullgraph=True, backend="aot_eager")
    ids = torch.arange(3, device=DEVICE)
    for ours, theirs in zip(draw(1, 2, ids, 9, 2, 3, impl="triton"), both(1, 2, ids, 9, 2, 3)[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(196, 4, 49), (256, 4, 64), (197, 8, 24), (1024, 4, 256), (LARGEST, 4, 1024)])
def test_whole_batches(shape: tuple[int, int, int]) -> None:
    ids = torch.randint(-(2**62), 2**62, (2**20 // shape[0],), device=DEVICE)
    assert_same(2**33 + 1, 7, ids, *shape)


@pytest.mark.gpu
def test_repeats_are_bit_equal() -> None:
    ids = torch.arange(4096, device=DEVICE)
    first = torch.cat([lists.flatten() for lists in both(0, 0, ids, 196, 4, 49)[0]])
    for _ in range(250):
        again = orthogonal_masks(0, 0, ids, 196, 4, 49, impl="triton")
        assert torch.equal(torch.cat([lists.flatten() for lists in again]), first)


@pytest.mark.gpu
def test_lists_past_2_31_entries() -> None:
    """There are 3.7 million images of 588 hidden ids each, so the last images are beyond entry 2^31."""
    ids = torch.arange(3_700_000, device=DEVICE)
    visible, hidden = orthogonal_masks(0, 0, ids, 196, 4, 49, impl="triton")
    assert hidden.numel() > 2**31
    last = orthogonal_masks(0, 0, ids[-64:], 196, 4, 49, impl="reference")
    assert torch.equal(visible[-64:], last[0]) and torch.equal(hidden[-64:], last[1])


MUTANTS = Mutants(
    "orthogonal_masks",
    __name__,
    {"named": lambda patch: test_named_shapes((13, 3, 4))},
    [
        (
            "words in their order",
            "named",
            "tl.join(first, third), tl.join(second",
            "tl.join(first, second), tl.join(third",
        ),
        ("the upper half of an id", "named", "(sample >> 32).to(tl.uint32)", "(sample >> 63).to(tl.uint32)"),
        (
            "the view of a rank",
            "named",
            "for view in range(views):\n        sequence = image * views + view",
            "for view in range(views):\n        sequence = image * views + views - 1 - view",
        ),
        (
            "the last hidden patch",
            "named",
            "is_hidden = (patch < patches) &",
            "is_hidden = (patch < patches - 1) &",
        ),
        ("the stride of hidden lists", "named", "sequence * (patches - shown)", "sequence * shown"),
        (
            "words past the image's end come last",
            "named",
            "tl.where(patch < patches, word.to(tl.uint64), 0xFFFFFFFF)",
            "word.to(tl.uint64)",
        ),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
