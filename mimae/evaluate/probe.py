"""Probes of a frozen encoder's features: a linear probe, a probe with few labels, nearest neighbours.

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
TOLERANCE, FOLD_TOLERANCE = 1e-6, 1e-4
"""Penalised mean cross-entropy, in nats, that a fit's last step promises to gain at most: for the classifiers that are
judged, and for those that choose among penalties, which are a factor of ten apart."""

_NEWTON_STEPS, _CG_STEPS, _HALVINGS = 100, 1000, 30
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


class _Problems(NamedTuple):
    """P penalised logistic regressions. The unknowns of each are its weights and, in the last row, its bias:
    (P, D + 1, C)."""

    samples: Tensor
    """(P, n, D + 1): the features and a column of ones."""
    labels: Tensor
    """(P, n)."""
    weights: Tensor
    """(P, n), with a sum of 1."""
    penalty: Tensor
    """(P, D + 1, 1): the factor of the squared unknowns, 0 for the bias."""
    inverse: Tensor
    """(P, D + 1, D + 1): a rough inverse of the Hessian of one class."""

    def take(self, chosen: Tensor) -> _Problems:
        """Return the problems that the mask `chosen` (P,) selects."""
        return _Problems(*(tensor[chosen] for tensor in self))

    def value(self, logits: Tensor, unknowns: Tensor) -> Tensor:
        """Return the penalised mean cross-entropies, (P,), in float64: float32 rounds gains near a minimum away."""
        entropy = F.cross_entropy(logits.double().mT, self.labels, reduction="none")
        squares = self.penalty.double() / 2 * unknowns.double().square()
        return (entropy * self.weights).sum(1) + squares.sum((1, 2))

    def newton_step(self, logits: Tensor, unknowns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step to the minimum of each problem's quadratic model, and the gain that the model promises, (P,).

        Conjugate gradients, preconditioned with `inverse`, run until an iteration gains less than a tenth of the mean
        gain of all iterations. The residual is no such measure: it can be small while most of the gain is to come.
        """
        shares = logits.softmax(2)
        weights = self.weights[:, :, None]
        errors = (shares - F.one_hot(self.labels, logits.shape[2])) * weights
        gradient = self._sums(errors) + self.penalty * unknowns
        # The same shift of all biases changes nothing: what rounding leaves in that direction has no curvature.
        gradient[:, -1] -= gradient[:, -1].mean(1, keepdim=True)
        direction, residual = torch.zeros_like(unknowns), -gradient
        search = preconditioned = self.inverse @ residual
        norm = _dot(residual, preconditioned)
        promise, going = torch.zeros_like(norm), norm > 0
        for count in range(1, _CG_STEPS + 1):
            # The Hessian times `search`: the logits move by `change`, and the softmax by its derivative along it.
            change = self.samples @ search
            change = shares * (change - (shares * change).sum(2, keepdim=True)) * weights
            product = self._sums(change) + self.penalty * search
            # A solved problem stands still while the others go on.
            length = torch.where(going, norm / _dot(search, product), 0)
            direction = direction + length[:, None, None] * search
            residual = residual - length[:, None, None] * product
            gain = length * norm / 2
            promise = promise + gain
            going = going & (count * gain > 0.1 * promise)
            if not going.any():
                break
            preconditioned = self.inverse @ residual
            before, norm = norm, _dot(residual, preconditioned)
            search = preconditioned + torch.where(going, norm / before, 0)[:, None, None] * search
        return direction, promise

    def step_length(self, logits: Tensor, unknowns: Tensor, direction: Tensor, promise: Tensor) -> Tensor:
        """Return the share of a step to take, (P, 1, 1): 1, halved until the value falls (Armijo's rule)."""
        before, change = self.value(logits, unknowns), self.samples @ direction
        length = torch.ones_like(promise)[:, None, None]
        for _ in range(_HALVINGS):
            after = self.value(logits + length * change, unknowns + length * direction)
            # float32 logits leave an error of about 1e-8 of the value.
            fell = after <= before - 1e-4 * length.flatten() * promise + 1e-8 * before
            if fell.all():
                break
            length = torch.where(fell[:, None, None], length, length / 2)
        return length

    def _sums(self, of_samples: Tensor) -> Tensor:
        """(P, n, C) -> (P, D + 1, C), summed over samples."""
        return (of_samples.mT @ self.samples).mT


class LogisticRegression:
    """P multinomial logistic regressions at once: features (P, n, D), labels (P, n) in [0, classes), and
    weights (P, n) of the samples in the mean, which need no common scale."""

    def __init__(self, features: Tensor, labels: Tensor, weights: Tensor, classes: int) -> None:
        used = weights.any(0)
        self.samples = F.pad(features[:, used], (0, 1), value=1.0)
        self.labels, self.classes = labels[:, used], classes
        self.weights = weights[:, used] / weights.sum(1, keepdim=True)
        # The Hessian of one class at zero weights. With it as preconditioner, strongly correlated features (pixels)
        # need tens of conjugate gradients instead of thousands.
        self.curvature = (self.samples.mT @ (self.samples * self.weights[:, :, None]) / classes).double()

    def fit(self, penalty: Tensor, start: Linear | None = None, tolerance: float = TOLERANCE) -> Linear:
        """Return the minima of mean cross-entropy + penalty / 2 * |weight|^2, penalty (P,), found by Newton's method
        from `start` or 0.

        The method is full-batch and deterministic. Each problem ends on its own: its last step is the first that
        promises to gain less than `tolerance`. A promise is at least a quarter of what there is to gain, as far as was
        seen, so that the value ends within ten times `tolerance` of the minimum.
        """
        penalties = penalty[:, None, None].repeat(1, self.samples.shape[2], 1)
        penalties[:, -1] = 0
        problems = _Problems(self.samples, self.labels, self.weights, penalties, self._inverse(penalties))
        if start is None:
            found = torch.zeros(*penalties.shape[:2], self.classes).to(self.samples)
        else:
            found = torch.cat([start.weight, start.bias], 1)
        places, unknowns = torch.arange(len(found), device=found.device), found
        for _ in range(_NEWTON_STEPS):
            logits = problems.samples @ unknowns
            direction, promise = problems.newton_step(logits, unknowns)
            unknowns = unknowns + problems.step_length(logits, unknowns, direction, promise) * direction
            found[places] = unknowns
            left = promise > tolerance
            if not left.any():
                break
            if not left.all():
                places, unknowns, problems = places[left], unknowns[left], problems.take(left)
        return Linear(found[:, :-1], found[:, -1:])

    def _inverse(self, penalties: Tensor) -> Tensor:
        """Return the inverse of the curvature at zero weights, with `penalties` (P, D + 1, 1), as (P, D + 1, D + 1)."""
        trace = self.curvature.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        damping = penalties[:, :, 0].double() + 1e-6 * trace  # past the rounding of `curvature`
        root = torch.linalg.cholesky(self.curvature + torch.diag_embed(damping)).to(self.samples.dtype)
        return torch.cholesky_inverse(root)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(P, D, C) each -> inner products, (P,)."""
    return (one * other).sum((1, 2))


def choose_penalties(features: Tensor, labels: Tensor, held: Tensor, classes: int) -> tuple[Tensor, Linear]:
    """features (G, n, D), labels (G, n), held (G, F, n) bool -> places in PENALTIES (G,): of each problem the
    one whose classifiers, fitted without a fold, are right most often on it, summed over F folds; of equals
    the strongest. Also returns the means of these classifiers over the folds, from which a fit to all samples starts.

    Ends once two penalties in a row were better for no problem.
    """
    groups, folds = held.shape[:2]
    features = features[:, None].expand(-1, folds, -1, -1).flatten(0, 1)
    labels = labels[:, None].expand(-1, folds, -1).flatten(0, 1)
    regression = LogisticRegression(features, labels, (~held).flatten(0, 1).to(features.dtype), classes)
    chosen, most = labels.new_zeros(groups), labels.new_full((groups,), -1)
    means = Linear(features.new_zeros(groups, features.shape[2], classes), features.new_zeros(groups, 1, classes))
    classifier, idle = None, 0
    for place, penalty in enumerate(PENALTIES):
        classifier = regression.fit(features.new_full((groups * folds,), penalty), classifier, FOLD_TOLERANCE)
        right = (classifier.right(features, labels) & held.flatten(0, 1)).view(groups, -1).sum(1)
        better = right > most
        chosen[better], most = place, torch.maximum(right, most)
        for mean, fitted in zip(means, classifier, strict=True):
            mean[better] = fitted.unflatten(0, (groups, folds)).mean(1)[better]
        idle = 0 if better.any() else idle + 1
        if idle == 2:
            break
    return chosen, means


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> tuple[float, float]:
    """-> accuracy on the test set of a linear classifier of all training features, and its penalty.

    The penalty is chosen on a stratified fifth of the training set.
    """
    held = ranks_in_class(train_labels.cpu(), seed=0).to(train.device) % FOLDS == 0
    train, train_labels = train[None], train_labels[None]
    chosen, start = choose_penalties(train, train_labels, held[None, None], classes)
    penalties, every = train.new_tensor(PENALTIES)[chosen], torch.ones_like(train[:, :, 0])
    classifier = LogisticRegression(train, train_labels, every, classes).fit(penalties, start)
    return _share(classifier.right(test[None], test_labels[None])), PENALTIES[int(chosen)]


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
    chosen, start = choose_penalties(features, labels, held, classes)
    penalties, every = features.new_tensor(PENALTIES)[chosen], torch.ones_like(features[:, :, 0])
    classifier = LogisticRegression(features, labels, every, classes).fit(penalties, start)
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
