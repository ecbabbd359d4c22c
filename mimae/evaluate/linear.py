"""Linear classifiers on frozen features: one on all labels, and one on few, each fitted to its minimum.

Letters in shapes: n samples, D features, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae.evaluate.samples import balanced_subset, ranks_in_class

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Penalties of the squared weights, from strong to weak. Each fit starts at the solution of the previous one."""

FOLDS = 5
DRAWS = 5
FEW_LABELS = 200
TOLERANCE, FOLD_TOLERANCE = 1e-6, 1e-4
"""Largest predicted gain of a fit's last step in penalised mean cross-entropy, in nats. The first value is for the
final classifiers, the second for the choice among penalties, which are a factor of ten apart."""

_NEWTON_STEPS, _CG_STEPS, _HALVINGS = 100, 1000, 30


class Linear(NamedTuple):
    """P linear classifiers, logits = x @ weight + bias: weight (P, D, C), bias (P, 1, C)."""

    weight: Tensor
    bias: Tensor

    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return, for features (P, n, D) and labels (P, n), which samples each classifier gets right: (P, n) bool."""
        return (features @ self.weight + self.bias).argmax(2) == labels


class _Problems(NamedTuple):
    """P penalised logistic regressions.

    The unknowns (P, D + 1, C) of each are its weights, with the bias in the last row.
    """

    samples: Tensor
    """Features (P, n, D + 1) with a column of ones."""
    labels: Tensor
    """Class of each sample, (P, n)."""
    weights: Tensor
    """Weight of each sample in the mean, (P, n), with a sum of 1 over n."""
    penalty: Tensor
    """Factors of the squared unknowns, (P, D + 1, 1); 0 for the bias."""
    inverse: Tensor
    """Approximate inverses of the Hessian of one class, (P, D + 1, D + 1)."""

    def take(self, chosen: Tensor) -> _Problems:
        """Return the problems that the mask `chosen` (P,) selects."""
        return _Problems(*(tensor[chosen] for tensor in self))

    def value(self, logits: Tensor, unknowns: Tensor) -> Tensor:
        """Return the penalised mean cross-entropies, (P,), in float64: float32 would lose gains near a minimum."""
        entropy = F.cross_entropy(logits.double().mT, self.labels, reduction="none")
        squares = self.penalty.double() / 2 * unknowns.double().square()
        return (entropy * self.weights).sum(1) + squares.sum((1, 2))

    def newton_step(self, logits: Tensor, unknowns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step to the minimum of each problem's quadratic model, and the gain that the model predicts, (P,).

        Conjugate gradients, preconditioned with `inverse`, run until an iteration gains less than a tenth of the mean
        gain of all iterations. The residual is not a suitable measure: it can be small before most of the gain.
        """
        shares = logits.softmax(2)
        weights = self.weights[:, :, None]
        errors = (shares - F.one_hot(self.labels, logits.shape[2])) * weights
        gradient = self._sums(errors) + self.penalty * unknowns
        # An equal shift of all biases has no effect; remove the rounding error in that direction, which has no
        # curvature.
        gradient[:, -1] -= gradient[:, -1].mean(1, keepdim=True)
        direction, residual = torch.zeros_like(unknowns), -gradient
        search = preconditioned = self.inverse @ residual
        norm = _dot(residual, preconditioned)
        promise, going = torch.zeros_like(norm), norm > 0
        for count in range(1, _CG_STEPS + 1):
            # This is the Hessian times `search`: the logits change by `change`, the softmax by its derivative along it.
            change = self.samples @ search
            change = shares * (change - (shares * change).sum(2, keepdim=True)) * weights
            product = self._sums(change) + self.penalty * search
            # A solved problem stays unchanged while the others continue.
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
        """Return the length of a step, (P, 1, 1): 1, halved until the value falls enough (Armijo's rule)."""
        before, change = self.value(logits, unknowns), self.samples @ direction
        length = torch.ones_like(promise)[:, None, None]
        for _ in range(_HALVINGS):
            after = self.value(logits + length * change, unknowns + length * direction)
            # float32 logits cause an error of about 1e-8 of the value.
            fell = after <= before - 1e-4 * length.flatten() * promise + 1e-8 * before
            if fell.all():
                break
            length = torch.where(fell[:, None, None], length, length / 2)
        return length

    def _sums(self, of_samples: Tensor) -> Tensor:
        """Return the products of the features with (P, n, C), summed over samples: (P, D + 1, C)."""
        return (of_samples.mT @ self.samples).mT


class LogisticRegression:
    """Set up P multinomial logistic regressions.

    features (P, n, D), labels (P, n) in [0, classes), and weights (P, n) of the samples in the mean, on any scale.
    """

    def __init__(self, features: Tensor, labels: Tensor, weights: Tensor, classes: int) -> None:
        used = weights.any(0)
        self.samples = F.pad(features[:, used], (0, 1), value=1.0)
        self.labels, self.classes = labels[:, used], classes
        self.weights = weights[:, used] / weights.sum(1, keepdim=True)
        # The Hessian of one class at zero weights. With it as preconditioner, strongly correlated features (pixels)
        # need tens of conjugate gradients instead of thousands.
        self.curvature = (self.samples.mT @ (self.samples * self.weights[:, :, None]) / classes).double()

    def fit(self, penalty: Tensor, start: Linear | None = None, tolerance: float = TOLERANCE) -> Linear:
        """Return the minima of mean cross-entropy + penalty / 2 * |weight|^2, penalty (P,), by Newton's method.

        It starts from `start`, or from 0, and is full-batch and deterministic. Each problem ends separately: its last
        step is the first with a predicted gain below `tolerance`. In all observed cases the prediction was at least a
        quarter of the possible gain, so that the value ends within ten times `tolerance` of the minimum.
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
        damping = penalties[:, :, 0].double() + 1e-6 * trace  # The term exceeds the rounding of `curvature`.
        root = torch.linalg.cholesky(self.curvature + torch.diag_embed(damping)).to(self.samples.dtype)
        return torch.cholesky_inverse(root)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner products (P,) of two tensors (P, D, C)."""
    return (one * other).sum((1, 2))


def choose_penalties(features: Tensor, labels: Tensor, held: Tensor, classes: int) -> tuple[Tensor, Linear]:
    """Choose a penalty for each problem by cross-validation: return its index in PENALTIES, (G,).

    features (G, n, D), labels (G, n), held (G, F, n) bool: the held-out samples of each fold. The chosen penalty has
    the most correct predictions on held-out samples, summed over the F folds; of equal ones the strongest is taken.
    Also returns the means of these classifiers over the folds, as a start for a fit to all samples. Stops when two
    penalties in a row improved no problem.
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
    """Return the test accuracy of a linear classifier of all training features, and its penalty.

    The penalty is chosen on a stratified fifth of the training set.
    """
    held = ranks_in_class(train_labels.cpu(), seed=0).to(train.device) % FOLDS == 0
    train, train_labels = train[None], train_labels[None]
    chosen, start = choose_penalties(train, train_labels, held[None, None], classes)
    penalties, every = train.new_tensor(PENALTIES)[chosen], torch.ones_like(train[:, :, 0])
    classifier = LogisticRegression(train, train_labels, every, classes).fit(penalties, start)
    return share_of(classifier.right(test[None], test_labels[None])), PENALTIES[int(chosen)]


def few_labels(classes: int) -> int:
    """Return the number of labels of the few-label probe: 200, or 5 for each class if that is more."""
    return max(FEW_LABELS, FOLDS * classes)


def few_label_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> list[float]:
    """Return the accuracies of linear classifiers on `few_labels(classes)` class-balanced training samples.

    There is one for each of 5 fixed draws. The penalty is chosen by cross-validation on these samples.
    """
    seeds = range(DRAWS)
    ids = torch.stack([balanced_subset(train_labels.cpu(), few_labels(classes), seed) for seed in seeds])
    labels = train_labels.cpu()[ids]
    ranks = torch.stack([ranks_in_class(drawn, seed) for drawn, seed in zip(labels, seeds, strict=True)])
    held = torch.stack([ranks % FOLDS == fold for fold in range(FOLDS)], 1).to(train.device)
    features, labels = train[ids.to(train.device)], labels.to(train.device)
    tests = test.expand(DRAWS, -1, -1)
    if features.shape[2] > features.shape[1]:
        # The optimal weights are in the span of the samples, so the problem has at most as many dimensions as samples.
        basis = torch.linalg.svd(features, full_matrices=False).Vh.mT
        features, tests = features @ basis, tests @ basis
    chosen, start = choose_penalties(features, labels, held, classes)
    penalties, every = features.new_tensor(PENALTIES)[chosen], torch.ones_like(features[:, :, 0])
    classifier = LogisticRegression(features, labels, every, classes).fit(penalties, start)
    return [share_of(right) for right in classifier.right(tests, test_labels.expand(DRAWS, -1))]


def share_of(right: Tensor) -> float:
    """Return the share of samples that are right."""
    return int(right.sum()) / right.numel()
