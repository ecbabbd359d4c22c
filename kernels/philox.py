"""Philox4x32-10 (Salmon et al., SC 2011; Random123) on integer tensors: the one source of randomness.

A stream is named by (seed, purpose, epoch, id); word l of it is output l mod 4 of the block with

    key     = (seed low, seed high)
    counter = (l div 4 + purpose * 2^24, epoch, id low, id high)

so a word does not depend on the batch, rank, worker or device that computes it (method 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS_OF_A_STREAM = 1 << 26

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Run ten rounds of Philox4x32. `counter`: four broadcastable int64 tensors of 32-bit words; `key`: two words.

    Returns four int64 tensors of words in [0, 2^32). The 64-bit product wraps in int64, which preserves its bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_words(seed: int, purpose: int, epoch: int, ids: Tensor, count: int, first: int = 0) -> Tensor:
    """Return words first .. first + count - 1 of the streams of `ids` (n,) int64, as int64 (n, count) in [0, 2^32).

    Raises ValueError if a stream would exceed its 2^26 words.
    """
    if first < 0 or count < 0 or first + count > WORDS_OF_A_STREAM:
        raise ValueError(f"a stream has words 0 to 2^26 - 1, asked for {first} to {first + count - 1}")
    blocks = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64, device=ids.device)
    ids = ids.to(torch.int64)[:, None]
    outputs = philox4x32(
        (blocks + (purpose << 24), torch.full_like(blocks, epoch), ids & _MASK, (ids >> 32) & _MASK),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    words = torch.stack(torch.broadcast_tensors(*outputs), -1).flatten(1)
    return words[:, first % 4 : first % 4 + count]
