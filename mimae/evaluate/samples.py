"""Labelled samples for probes: orders within classes, balanced subsets, shared classes, standardised features.

Letters in shapes: n samples, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mimae.data.sources.base import Source
from mimae.errors import UserError


def ranks_in_class(labels: Tensor, seed: int) -> Tensor:
    """Return the rank (n,) of each sample in a random order of its class, fixed by the seed, for labels (n,).

    Samples with equal rank modulo 5 are a stratified fifth; the samples of lowest rank are a class-balanced subset.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    firsts = (counts.cumsum(0) - counts)[labels[by_class]]
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - firsts
    return ranks


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return ascending ids of `count` samples. If classes have enough samples, their sizes differ by at most one."""
    if count >= len(labels):
        return torch.arange(len(labels))
    ties = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = ties[torch.argsort(ranks_in_class(labels, seed)[ties], stable=True)[:count]]
    return chosen.sort().values


# The three measures


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Return both (n, D) standardised by the mean and deviation of `train`.

    Features that do not vary become 0 there.
    """
    deviation, mean = torch.std_mean(train, 0, correction=0)
    deviation = torch.where(deviation > 1e-6 * mean.abs().clamp_min(1e-6), deviation, 1.0)
    return [(features - mean) / deviation for features in (train, *others)]


def shared_labels(train: Source, test: Source) -> tuple[Tensor, Tensor, int]:
    """Return the labels (n,) int64 of both sources with common numbers from 0, and the number of classes.

    Classes are matched by name if both sources have names, otherwise by number. Raises UserError if labels are missing
    or the test set has a class that the training set lacks.
    """
    keys = []
    for source in (train, test):
        if source.labels is None:
            raise UserError(
                f"{source.name} has no labels, which a probe needs: put each class into a separate folder "
                f"directly below it, or name a list file with a class number on each line"
            )
        named = train.classes is not None and test.classes is not None and source.classes is not None
        keys.append(np.array(source.classes)[source.labels] if named else source.labels)
    known, train_labels = np.unique(keys[0], return_inverse=True)
    if strange := sorted(set(keys[1].tolist()).difference(known.tolist())):
        raise UserError(
            f"{test.name} holds {len(strange)} classes that the training set {train.name} lacks, "
            f"{strange[0]} among them; a test set may only have classes of the training set, for example {known[0]}"
        )
    return torch.from_numpy(train_labels), torch.from_numpy(np.searchsorted(known, keys[1])), len(known)
