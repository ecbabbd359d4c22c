"""Tests of Philox4x32-10 against the published answers of Random123 and against Python's unbounded integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimae.kernels import philox4x32, philox_words

WORD = st.integers(0, 2**32 - 1)


def test_published_answers() -> None:
    def answer(counter: int, key: int) -> list[str]:
        word = torch.tensor([counter])
        return [f"{value.item():08x}" for value in philox4x32((word, word, word, word), (key, key))]

    assert answer(0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert answer(0xFFFFFFFF, 0xFFFFFFFF) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """Compute the rounds of the paper with unbounded integers."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_equals_unbounded_integers(counter: list[int], key: list[int]) -> None:
    """Products beyond 2^63 wrap around in int64, which must not lose information."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    got = [int(word) for word in philox4x32((c0, c1, c2, c3), (key[0], key[1]))]
    assert got == philox_in_integers(counter, key)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 9),
)
def test_stream_layout(seed: int, purpose: int, epoch: int, sample: int, word: int) -> None:
    """Word l is output l mod 4 of block l div 4, with the key and counter of method 1, for ids of 64 bits."""
    unsigned = sample % 2**64
    counter = [word // 4 + purpose * 2**24, epoch, unsigned % 2**32, unsigned >> 32]
    expected = philox_in_integers(counter, [seed % 2**32, seed >> 32])[word % 4]
    assert philox_words(seed, purpose, epoch, torch.tensor([sample]), 1, first=word).item() == expected


def test_words_do_not_depend_on_the_batch_or_the_part_asked_for() -> None:
    ids = torch.tensor([5, 2**40 + 1, 0])
    whole = philox_words(7, 1, 3, ids, 11)
    assert torch.equal(philox_words(7, 1, 3, ids[1:2], 11), whole[1:2])
    assert torch.equal(philox_words(7, 1, 3, ids, 6, first=5), whole[:, 5:])


def test_a_stream_ends() -> None:
    with pytest.raises(ValueError, match=r"2\^26"):
        philox_words(0, 1, 0, torch.tensor([0]), 1, first=1 << 26)
