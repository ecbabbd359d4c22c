"""Probes of a frozen encoder's features: a linear probe, a probe with few labels, nearest neighbours.

A feature is the mean of the patch tokens of the whole image. All measures use features that are standardised by the
mean and deviation of the training set. The test set is used once, to count correct predictions. The baselines are raw
pixels, which need no network, and the encoder before training, which has learned nothing.

Letters in shapes: n samples, D features, C classes.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.kept import load_run
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.evaluate.features import Extractor, extract, pixels
from mimae.evaluate.knn import nearest_neighbours
from mimae.evaluate.linear import FOLDS, few_label_probe, few_labels, linear_probe
from mimae.evaluate.samples import balanced_subset, shared_labels, standardise
from mimae.model.mimae import build
from mimae.outside.progress import Progress
from mimae.transfer.load import load, load_encoder

MEASURES = ("linear", "few_labels", "knn")


def measure(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> dict[str, Any]:
    """Return the three measures of one kind of features, (n, D) float each.

    `linear`, `few_labels` and `knn` are accuracies; `few_labels` is a mean over draws and `few_labels_std` their
    standard deviation; `penalty` is that of the linear probe.
    """
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


def probe(
    run: str | Path,
    train: str | None = None,
    test: str | None = None,
    images: int = 50_000,
    baselines: bool = True,
) -> dict[str, Any]:
    """Probe a run (its newest checkpoint) or one checkpoint; with `baselines`, also raw pixels and the random encoder.

    `train` and `test` are data paths that replace the run's. At most `images` class-balanced images of the training set
    are used. Returns the content of probe.json, which `mimae probe` writes. Raises UserError.
    """
    run, started = Path(run), time.monotonic()
    loaded = load(run)
    recipe = load_run(checkpoint.run_of(run))
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
            f"{images:,} are used; a probe needs {FOLDS} for each class, {FOLDS * classes:,}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {"random encoder": build(recipe).encoder.eval()} if baselines else {}
    encoders["this run"] = loaded.encoder
    if recipe.ema.decay is not None:
        encoders["this run, moving average"] = load_encoder(run, average=True)
    extractors: dict[str, Extractor] = {"raw pixels": pixels} if baselines else {}
    extractors |= {name: network.to(device).features for name, network in encoders.items()}
    chosen = [balanced_subset(labels[0], images, seed=0), torch.arange(len(labels[1]))]
    with Progress("features", sum(map(len, chosen)), "images") as progress:
        (train_features, train_ids), (test_features, test_ids) = (
            extract(extractors, recipe.data, source, ids, device, progress.add)
            for source, ids in zip(sources, chosen, strict=True)
        )
    train_labels, test_labels = labels[0].to(device)[train_ids], labels[1].to(device)[test_ids]
    scores = {}
    with Progress("probes", len(extractors)) as progress:
        for name in extractors:
            progress.begin(name)
            scores[name] = measure(train_features[name], train_labels, test_features[name], test_labels, classes)
    return {
        "checkpoint": loaded.checkpoint,
        "train": sources[0].name,
        "test": sources[1].name,
        "train_images": len(train_ids),
        "test_images": len(test_ids),
        "unreadable_images": sum(map(len, chosen)) - len(train_ids) - len(test_ids),
        "classes": classes,
        "few_labels": few_labels(classes),
        "features": scores,
        "seconds": time.monotonic() - started,
    }
