"""Nearest neighbours of frozen features: a measure without training.

Letters in shapes: n samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.distributed import all_sum
from mimae.evaluate.features import extract
from mimae.evaluate.linear import share_of
from mimae.evaluate.samples import balanced_subset, shared_labels, standardise
from mimae.evaluate.share import gather_rows, share
from mimae.model.encoder import Encoder
from mimae.model.mimae import MIMAE

NEIGHBOURS = 20
VOTE_TEMPERATURE = 0.07


def nearest_neighbours(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """Return the accuracy of the vote of the 20 training samples of highest cosine, with weights exp(cosine / 0.07)."""
    return share_of(vote(train, train_labels, test, classes) == test_labels)


def vote(train: Tensor, train_labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Return the class (n,) that the nearest neighbours of each of n test samples vote for."""
    bank = F.normalize(train, dim=1)
    predicted = []
    for queries in F.normalize(test, dim=1).split(1024):
        cosine, ids = (queries @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        weights = ((cosine - cosine[:, :1]) / VOTE_TEMPERATURE).exp()
        votes = torch.zeros(len(queries), classes, dtype=weights.dtype, device=weights.device)
        predicted.append(votes.scatter_add_(1, train_labels[ids], weights).argmax(1))
    return torch.cat(predicted)


def knn_accuracy(encoder: Encoder | MIMAE, data: DataSettings, train: Source, test: Source, limit: int) -> float:
    """Return the nearest-neighbour accuracy of the present encoder, a measure that is cheap enough for use in training.

    It uses class-balanced subsets of at most `limit` images of each source. Raises UserError if labels are missing. A
    collective: each rank extracts and classifies its share. The training features are gathered in the order of their
    ids, so that the result depends on the number of ranks only through rounding.
    """
    *labels, classes = shared_labels(train, test)
    device = next(encoder.buffers()).device
    sides = []
    for source, known in zip((train, test), labels, strict=True):
        mine = share(balanced_subset(known, limit, seed=0))
        features, ids = extract({"encoder": encoder.features}, data, source, mine.ids, device)
        own = torch.isin(ids, mine.ids[: mine.own].to(device))
        sides.append((features["encoder"][own], ids[own]))
    (bank, bank_ids), (queries, query_ids) = sides
    bank, bank_ids = gather_rows(bank), gather_rows(bank_ids)
    order = bank_ids.argsort()
    bank, queries = standardise(bank[order], queries)
    predicted = vote(bank, labels[0].to(device)[bank_ids[order]], queries, classes)
    right = (predicted == labels[1].to(device)[query_ids]).sum()
    right, total = all_sum(torch.stack([right, right.new_tensor(len(query_ids))])).tolist()
    return right / total
