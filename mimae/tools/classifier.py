"""Use of a trained classifier on images: `mimae evaluate` and `mimae predict`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from mimae.checkpoints import checkpoint
from mimae.config.kept import load_run
from mimae.config.recipe import ClassifyRecipe
from mimae.data.loading.loader import evaluation_batches
from mimae.data.loading.readers import Central
from mimae.data.sources.open import open_source
from mimae.errors import CheckpointError, UserError
from mimae.evaluate.classes import Classes
from mimae.model.classifier import Classifier
from mimae.outside.progress import Progress, track
from mimae.outside.text import printable
from mimae.randomness import materialise
from mimae.train.tasks.classify import Classify, Evaluation

_BATCH = 64


class Trained(NamedTuple):
    """A classifier of a run, in eval mode on `device`."""

    task: Classify
    model: Classifier
    classes: Classes
    step: int
    device: torch.device


def load(path: Path, average: bool = False) -> Trained:
    """Return the classifier of a run (its newest whole checkpoint) or of one checkpoint; `average`: with the moving
    average of its weights. The training images are not needed. Raises CheckpointError, ConfigError."""
    recipe = load_run(checkpoint.run_of(path), (), None, ClassifyRecipe)
    if average and recipe.ema.decay is None:
        raise CheckpointError(f"{path} has no moving average: the run's ema.decay was null")
    # Its weights go anywhere; the backend that trained them may be another machine's.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "sdpa"})})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = Classify(recipe)

    def fill(found: checkpoint.Checkpoint) -> tuple[Classifier, Classes]:
        try:
            classes = Classes.read(found.state["task"]["classes"])
            with torch.device("meta"):
                model = task.model(len(classes))
            materialise(model, device)
            model.load_state_dict(found.tensors("model") | (found.tensors("ema") if average else {}))
        except (KeyError, TypeError, RuntimeError) as error:
            said = printable(" ".join(str(error).split()))[:300]
            raise CheckpointError(f"{found.path} does not hold the classifier of config.yaml: {said}") from error
        return model, classes

    found, (model, classes) = checkpoint.use_at(path, fill)
    return Trained(task, model.eval(), classes, int(found.state["step"]), device)


@torch.no_grad()
def evaluate(trained: Trained, data: str | None) -> tuple[str, Evaluation]:
    """Return the name of a data set, by default the run's data.val_path, and what the classifier makes of it."""
    settings = trained.task.recipe.data
    path = data or settings.val_path
    if path is None:
        raise UserError("the run has no data.val_path: name labelled images with --data PATH")
    source = open_source(path, settings=settings, use="held-out")
    with Progress("evaluating", len(source), "images") as progress:
        found = trained.task.evaluation(trained.model, trained.classes, source, trained.device, progress.add)
    return source.name, found


@torch.no_grad()
def predictions(trained: Trained, data: str, top: int) -> Iterator[list[str]]:
    """Yield a row for each image of a data set, in order: its path, then the `top` most probable classes, each with
    its probability. An image that cannot be read has its path alone."""
    settings = trained.task.recipe.data
    source = open_source(data, settings=settings, use="held-out")
    reader = Central(settings, trained.task.recipe.evaluation.crop)
    batches = evaluation_batches(settings, source, _BATCH, reader=reader)
    for batch in track(batches, "predicting", -(-len(source) // _BATCH), "batches"):
        logits = trained.task.logits(trained.model, batch.images.to(trained.device)).float()
        best = logits.softmax(1).topk(min(top, len(trained.classes)))
        read = (batch.source_ids == batch.sample_ids).tolist()
        rows = zip(batch.sample_ids.tolist(), read, best.values.tolist(), best.indices.tolist(), strict=True)
        for sample, is_read, shares, places in rows:
            found = zip(map(trained.classes.name, places), shares, strict=True) if is_read else ()
            yield [source.path(sample), *(cell for name, share in found for cell in (name, f"{share:.6f}"))]


def heading(trained: Trained, top: int) -> list[str]:
    """Return the names of the columns of `predictions`."""
    count = min(top, len(trained.classes))
    numbered = [("class", "probability"), *((f"class_{i}", f"probability_{i}") for i in range(2, count + 1))]
    return ["path", *(cell for pair in numbered[:count] for cell in pair)]


def as_csv(row: list[str]) -> str:
    """Return a line of a CSV file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row)
    return line.getvalue()
