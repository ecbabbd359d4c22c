"""Detection of duplicate samples: by equal bytes, or by a perceptual hash that modified copies keep."""

from __future__ import annotations

import itertools

import numpy as np

NEAR = 3
"""Largest number of the 64 bits in which the hashes of two similar images differ."""

_PLAIN = 6
"""Smallest number of ones and of zeros in a usable hash: uniform images all have nearly the same hash."""


def perceptual_hash(small: np.ndarray) -> int:
    """Return the 64-bit dHash of an image resized to uint8 (8, 9, 3).

    A bit says whether a pixel's luma is larger than that of its right neighbour. Copies of an image in another size,
    format, quality, brightness or contrast keep nearly all bits.
    """
    luma = small.astype(np.int64) @ (299, 587, 114)
    return int.from_bytes(np.packbits(luma[:, :-1] > luma[:, 1:]).tobytes(), "big")


def same(digests: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """Return the groups of at least two `ids` with equal digests, each in ascending order."""
    return _groups(np.unique(digests, return_inverse=True)[1], ids)


def near_duplicates(hashes: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """Return the groups of at least two `ids` (n,) that are linked by hashes uint64 (n,) at most NEAR bits apart.

    Hashes of uniform images are left out. Two hashes that differ in at most three bits have at least one of their four
    16-bit parts in common, so only hashes with an equal part are compared.
    """
    ones = np.bitwise_count(hashes)
    told = (ones >= _PLAIN) & (ones <= 64 - _PLAIN)
    values, inverse = np.unique(hashes[told], return_inverse=True)
    root = np.arange(len(values))
    for shift in range(0, 64, 16):
        part = (values >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.argsort(part, kind="stable")
        part, at = part[order], np.arange(len(order))
        # Compare each hash with the next one that has the same part, then with the one after that, and so on.
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
    """Return the representative of i's group and shorten the path to it (union-find)."""
    while root[i] != i:
        root[i] = root[root[i]]
        i = int(root[i])
    return i


def _groups(numbers: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """Return the `ids` of each number that occurs at least twice; groups are ordered by their first ids."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    groups = [group.tolist() for group in np.split(ids[order], starts[1:]) if len(group) > 1]
    return sorted(groups)
