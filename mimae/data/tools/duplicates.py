"""Samples that come more than once: by equal bytes, or by a hash of how they look that copies keep."""

from __future__ import annotations

import itertools

import numpy as np

NEAR = 3
"""Bits of 64 in which the hashes of two images that look alike differ at most."""

_PLAIN = 6
"""Bits that a hash needs of either kind: plain images all have nearly the same hash."""


def perceptual_hash(small: np.ndarray) -> int:
    """64 bits, of an image resized to uint8 (8, 9, 3): whether each pixel's luma is above that of its right neighbour.

    Another size, format, quality, brightness or contrast of the same image keeps nearly all of them (dHash).
    """
    luma = small.astype(np.int64) @ (299, 587, 114)
    return int.from_bytes(np.packbits(luma[:, :-1] > luma[:, 1:]).tobytes(), "big")


def same(digests: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """The groups of at least two `ids` with equal digests, each in rising order."""
    return _groups(np.unique(digests, return_inverse=True)[1], ids)


def near_duplicates(hashes: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """The groups of at least two `ids` (n,) linked by hashes uint64 (n,) at most NEAR bits apart; plain ones left out.

    Two such hashes have at least one of their four 16-bit parts in common, so only hashes with an equal part are
    compared.
    """
    ones = np.bitwise_count(hashes)
    told = (ones >= _PLAIN) & (ones <= 64 - _PLAIN)
    values, inverse = np.unique(hashes[told], return_inverse=True)
    root = np.arange(len(values))
    for shift in range(0, 64, 16):
        part = (values >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.argsort(part, kind="stable")
        part, at = part[order], np.arange(len(order))
        # Each with the next of those that have its part, then with the second next, as long as there is one.
        for step in itertools.count(1):
            at = at[at + step < len(order)]
            at = at[part[at] == part[at + step]]
            if not len(at):
                break
            one, other = order[at], order[at + step]
            close = np.bitwise_count(values[one] ^ values[other]) <= NEAR
            for i, j in zip(one[close].tolist(), other[close].tolist()):
                root[_root(root, i)] = _root(root, j)
    return _groups(np.array([_root(root, i) for i in inverse.tolist()], np.int64), ids[told])


def _root(root: np.ndarray, i: int) -> int:
    """The representative of i's group, the way to it made shorter."""
    while root[i] != i:
        root[i] = root[root[i]]
        i = int(root[i])
    return i


def _groups(numbers: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """The `ids` of each number that comes at least twice, groups in the order of their first ids."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    groups = [group.tolist() for group in np.split(ids[order], starts[1:]) if len(group) > 1]
    return sorted(groups)
