"""What a frozen encoder's features are worth: a linear probe, a probe with few labels, nearest neighbours.

A feature is the mean of the patch tokens of the whole image. Every measure sees features that are
standardised by the mean and the deviation of the training set; the test set is looked at once, to count what
was right. Each number stands beside those of raw pixels and of the encoder that the run began with: the first
is what needs no network, the second what needs no learning.

Letters in shapes: n samples, D features, C classes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mimae.config.kept import load_run
from mimae.data.loading.loader import evaluation_batches
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.distributed import all_sum
from mimae.errors import UserError
from mimae.evaluate.share import gather_rows, share
from mimae.model.encoder import Encoder
from mimae.model.mimae import MIMAE, build
from mimae.transfer.export import load_encoder

MEASURES = ("linear", "few_labels", "knn")
PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Penalties of the squared weights, from strong to weak: each fit starts at the previous one."""

FOLDS = 5
DRAWS = 5
FEW_LABELS = 200
NEIGHBOURS = 20
VOTE_TEMPERATURE = 0.07
_PIXEL_SIDE = 32
_BATCH = 256


# Choosing samples


def ranks_in_class(labels: Tensor, seed: int) -> Tensor:
    """labels (n,) -> (n,): the place of each sample in a random order of its class, fixed by the seed.

    Rank modulo 5 is a stratified fifth; the samples of lowest rank are a class-balanced subset.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    firsts = (counts.cumsum(0) - counts)[labels[by_class]]
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - firsts
    return ranks


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """-> ascending ids of `count` samples. Where classes have enough, their sizes differ by one at most."""
    if count >= len(labels):
        return torch.arange(len(labels))
    ties = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = ties[torch.argsort(ranks_in_class(labels, seed)[ties], stable=True)[:count]]
    return chosen.sort().values


# The three measures


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """(n, D) each -> less the mean of `train`, over its deviation; features that do not vary stay 0 there."""
    deviation, mean = torch.std_mean(train, 0, correction=0)
    deviation = torch.where(deviation > 1e-6 * mean.abs().clamp_min(1e-6), deviation, 1.0)
    return [(features - mean) / deviation for features in (train, *others)]


class Linear(NamedTuple):
    """P linear classifiers, logits = x @ weight + bias: weight (P, D, C), bias (P, 1, C)."""

    weight: Tensor
    bias: Tensor

    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """features (P, n, D), labels (P, n) -> (P, n) bool: which samples each classifier gets right."""
        return (features @ self.weight + self.bias).argmax(2) == labels


class LogisticRegression:
    """P multinomial logistic regressions at once: features (P, n, D), labels (P, n) in [0, classes), and
    weights (P, n) of the samples in the mean, which need no common scale."""

    def __init__(self, features: Tensor, labels: Tensor, weights: Tensor, classes: int) -> None:
        self.features, self.labels, self.classes = features, labels, classes
        self.weights = weights / weights.sum(1, keepdim=True)
        # The loss at zero weights has this curvature. Scaled by its root, strongly correlated features
        # (pixels) need tens of iterations and not thousands.
        self.curvature = (features.mT @ (features * self.weights[:, :, None]) / classes).double()

    def fit(self, penalty: Tensor, start: Linear | None = None) -> Linear:
        """The minimum of mean cross-entropy + penalty / 2 * |weight|^2, penalty (P,), by L-BFGS from `start`
        or 0.

        Full batch, deterministic, until a step gains less than 1e-4, and at most 100 iterations.
        """
        problems, dimensions, _ = self.curvature.shape
        trace = self.curvature.diagonal(dim1=1, dim2=2).sum(1)
        damping = penalty.double() + 1e-5 * trace  # past the rounding of `curvature`
        identity = torch.eye(dimensions).to(self.curvature)
        damped = self.curvature + damping[:, None, None] * identity
        # (P, D, D) upper triangular; weight = root^-1 @ whitened.
        root = torch.linalg.cholesky(damped).mT.to(self.features.dtype)
        if start is None:
            whitened = torch.zeros(problems, dimensions, self.classes).to(self.features)
            bias = torch.zeros(problems, 1, self.classes).to(self.features)
        else:
            whitened, bias = root @ start.weight, start.bias.clone()
        optimizer = torch.optim.LBFGS(
            [whitened.requires_grad_(), bias.requires_grad_()],
            max_iter=100,
            history_size=20,
            tolerance_grad=1e-5,
            tolerance_change=1e-4,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            weight = torch.linalg.solve_triangular(root, whitened, upper=True)
            logits = self.features @ weight + bias
            entropy = F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), reduction="none")
            value = (entropy.view_as(self.weights) * self.weights).sum()
            value = value + (penalty / 2 * weight.square().sum((1, 2))).sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        weight = torch.linalg.solve_triangular(root, whitened.detach(), upper=True)
        return Linear(weight, bias.detach())


def choose_penalties(features: Tensor, labels: Tensor, held: Tensor, classes: int) -> Tensor:
    """features (G, n, D), labels (G, n), held (G, F, n) bool -> places in PENALTIES (G,): of each problem the
    one whose classifiers, fitted without a fold, are right most often on it, summed over F folds; of equals
    the strongest.

    Ends once two penalties in a row were better for no problem.
    """
    groups, folds = held.shape[:2]
    features = features[:, None].expand(-1, folds, -1, -1).flatten(0, 1)
    labels = labels[:, None].expand(-1, folds, -1).flatten(0, 1)
    regression = LogisticRegression(features, labels, (~held).flatten(0, 1).to(features.dtype), classes)
    chosen, most = labels.new_zeros(groups), labels.new_full((groups,), -1)
    classifier, idle = None, 0
    for place, penalty in enumerate(PENALTIES):
        classifier = regression.fit(features.new_full((groups * folds,), penalty), classifier)
        right = (classifier.right(features, labels) & held.flatten(0, 1)).view(groups, -1).sum(1)
        better = right > most
        chosen[better], most = place, torch.maximum(right, most)
        idle = 0 if better.any() else idle + 1
        if idle == 2:
            break
    return chosen


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> tuple[float, float]:
    """-> accuracy on the test set of a linear classifier of all training features, and its penalty.

    The penalty is chosen on a stratified fifth of the training set.
    """
    held = ranks_in_class(train_labels.cpu(), seed=0).to(train.device) % FOLDS == 0
    train, train_labels = train[None], train_labels[None]
    penalty = PENALTIES[int(choose_penalties(train, train_labels, held[None, None], classes))]
    every = torch.ones_like(train[:, :, 0])
    classifier = LogisticRegression(train, train_labels, every, classes).fit(train.new_tensor([penalty]))
    return _share(classifier.right(test[None], test_labels[None])), penalty


def few_labels(classes: int) -> int:
    """Labels that the few-label probe may use: 200, or 5 a class where that is more."""
    return max(FEW_LABELS, FOLDS * classes)


def few_label_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> list[float]:
    """-> accuracies of linear classifiers that know the labels of `few_labels(classes)` training samples,
    class-balanced, one for each of 5 fixed draws. The penalty is chosen by cross-validation among those
    labels."""
    seeds = range(DRAWS)
    ids = torch.stack([balanced_subset(train_labels.cpu(), few_labels(classes), seed) for seed in seeds])
    labels = train_labels.cpu()[ids]
    ranks = torch.stack([ranks_in_class(drawn, seed) for drawn, seed in zip(labels, seeds, strict=True)])
    held = torch.stack([ranks % FOLDS == fold for fold in range(FOLDS)], 1).to(train.device)
    features, labels = train[ids.to(train.device)], labels.to(train.device)
    tests = test.expand(DRAWS, -1, -1)
    if features.shape[2] > features.shape[1]:
        # The optimal weights lie in the span of the samples: the problem has no more dimensions than these.
        basis = torch.linalg.svd(features, full_matrices=False).Vh.mT
        features, tests = features @ basis, tests @ basis
    penalties = features.new_tensor(PENALTIES)[choose_penalties(features, labels, held, classes)]
    every = torch.ones_like(features[:, :, 0])
    classifier = LogisticRegression(features, labels, every, classes).fit(penalties)
    return [_share(right) for right in classifier.right(tests, test_labels.expand(DRAWS, -1))]


def nearest_neighbours(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """-> accuracy of the vote of the 20 training samples of highest cosine, weights exp(cosine / 0.07)."""
    return _share(vote(train, train_labels, test, classes) == test_labels)


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


def _share(right: Tensor) -> float:
    return int(right.sum()) / right.numel()


def measure(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> dict[str, Any]:
    """-> the three measures of one kind of features, (n, D) float each: `linear`, `few_labels` and `knn` are
    accuracies; `few_labels` is a mean over draws, `few_labels_std` their deviation; `penalty` is the linear
    probe's."""
    train, test = standardise(train, test)
    linear, penalty = linear_probe(train, train_labels, test, test_labels, classes)
    few = few_label_probe(train, train_labels, test, test_labels, classes)
    return {
        "linear": linear,
        "few_labels": statistics.fmean(few),
        "knn": nearest_neighbours(train, train_labels, test, test_labels, classes),
        "penalty": penalty,
        "few_labels_std": statistics.stdev(few),
    }


# Features

Extractor = Callable[[Tensor], Tensor]
"""images (B, H, W, 3) uint8 -> features (B, D) float."""


def pixels(images: Tensor) -> Tensor:
    """The pixels themselves, averaged down to 32 x 32 where there are more."""
    planes = images.permute(0, 3, 1, 2).float()
    height, width = (min(side, _PIXEL_SIDE) for side in planes.shape[2:])
    return F.adaptive_avg_pool2d(planes, (height, width)).flatten(1)


@torch.no_grad()
def extract(
    extractors: Mapping[str, Extractor], data: DataSettings, source: Source, ids: Tensor, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """-> features (n, D) of each extractor, float32, and the ids (n,) that they belong to, all on `device`.

    Each image is decoded once for all of them. What cannot be read has no features.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in extractors}
    read = []
    for batch in evaluation_batches(data, source, _BATCH, ids):
        batch = batch.to(device)
        whole = batch.source_ids == batch.sample_ids
        for name, extractor in extractors.items():
            found[name].append(extractor(batch.images)[whole].float())
        read.append(batch.sample_ids[whole])
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(read)


def shared_labels(train: Source, test: Source) -> tuple[Tensor, Tensor, int]:
    """-> labels (n,) int64 of both sources in one numbering from 0 on, and the number of classes.

    Classes go by name where both sources have names, else by number. Raises UserError where labels are
    missing or the test set holds a class that the training set lacks.
    """
    keys = []
    for source in (train, test):
        if source.labels is None:
            raise UserError(
                f"{source.name} has no labels, which a probe needs: put each class into a folder of its own "
                f"right below it, or name a list file with a class number on each line"
            )
        named = train.classes is not None and test.classes is not None and source.classes is not None
        keys.append(np.array(source.classes)[source.labels] if named else source.labels)
    known, train_labels = np.unique(keys[0], return_inverse=True)
    if strange := sorted(set(keys[1].tolist()).difference(known.tolist())):
        raise UserError(
            f"{test.name} holds {len(strange)} classes that the training set {train.name} lacks, "
            f"{strange[0]} among them; a test set may hold only classes of the training set, as {known[0]}"
        )
    return torch.from_numpy(train_labels), torch.from_numpy(np.searchsorted(known, keys[1])), len(known)


def knn_accuracy(encoder: Encoder | MIMAE, data: DataSettings, train: Source, test: Source, limit: int) -> float:
    """-> nearest-neighbour accuracy of the encoder as it is, on class-balanced subsets of at most `limit`
    images of each source: cheap enough to follow a run with. Raises UserError where labels are missing.

    A collective: each rank extracts and classifies its share. The training features are put together in the order of
    their ids, so that the result does not depend on the number of ranks, but for rounding."""
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


# The verb


def probe(
    run: str | Path,
    train: str | None = None,
    test: str | None = None,
    images: int = 50_000,
    baselines: bool = True,
) -> dict[str, Any]:
    """Probes the newest checkpoint of a run, with `baselines` beside raw pixels and the encoder before
    training.

    `train` and `test` are data paths in place of the run's; of the training set at most `images`,
    class-balanced, are used. Returns what `mimae probe` writes to probe.json. Raises UserError.
    """
    run, started = Path(run), time.monotonic()
    encoder = load_encoder(run)
    recipe = load_run(run)
    if test is None and recipe.data.val_path is None:
        raise UserError(
            f"{run} has no test set: data.val_path is null in its config.yaml; name one with --test PATH, "
            f"images of the same classes as {train or recipe.data.path}"
        )
    sources = [
        open_source(train or recipe.data.path, settings=recipe.data),
        open_source(test or str(recipe.data.val_path), settings=recipe.data, use="held-out"),
    ]
    *labels, classes = shared_labels(*sources)
    if min(len(labels[0]), images) < FOLDS * classes:
        raise UserError(
            f"{sources[0].name} holds {len(labels[0]):,} images of {classes:,} classes, of which at most "
            f"{images:,} are used; a probe needs {FOLDS} a class, {FOLDS * classes:,}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {"random encoder": build(recipe).encoder.eval()} if baselines else {}
    encoders["this run"] = encoder
    if recipe.ema.decay is not None:
        encoders["this run, moving average"] = load_encoder(run, average=True)
    extractors: dict[str, Extractor] = {"raw pixels": pixels} if baselines else {}
    extractors |= {name: network.to(device).features for name, network in encoders.items()}
    chosen = [balanced_subset(labels[0], images, seed=0), torch.arange(len(labels[1]))]
    (train_features, train_ids), (test_features, test_ids) = (
        extract(extractors, recipe.data, source, ids, device) for source, ids in zip(sources, chosen, strict=True)
    )
    train_labels, test_labels = labels[0].to(device)[train_ids], labels[1].to(device)[test_ids]
    return {
        "train": sources[0].name,
        "test": sources[1].name,
        "train_images": len(train_ids),
        "test_images": len(test_ids),
        "unreadable_images": sum(map(len, chosen)) - len(train_ids) - len(test_ids),
        "classes": classes,
        "few_labels": few_labels(classes),
        "features": {
            name: measure(train_features[name], train_labels, test_features[name], test_labels, classes)
            for name in extractors
        },
        "seconds": time.monotonic() - started,
    }
