"""Use of a trained model on other images: `mimae evaluate` and `mimae predict`, for runs of every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mimae.data.loading.loader import evaluation_batches
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.endings import is_image
from mimae.data.sources.files import FileSource
from mimae.data.sources.index import Index
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.outside.paths import user_path
from mimae.outside.progress import Progress
from mimae.train.predictors.base import Names, Options, Predictor, new_folder
from mimae.train.task import Details
from mimae.train.trained import Trained

LISTED = 5
"""Images that cannot be read whose paths are listed."""

_JPEG_QUALITY = 90


class Evaluated(NamedTuple):
    """Measures of a trained model on labelled images."""

    data: str
    """Name of the images."""
    measures: dict[str, float]
    """By the names that epochs.jsonl has."""
    details: Details | None
    picture: bytes | None
    """PNG, where it was asked for and the task draws one."""


class Predicted(NamedTuple):
    """Summary of the files that `mimae predict` wrote."""

    images: int
    unread: int
    """Number of images that could not be read."""
    listed: list[str]
    """Paths of the first of them."""


@torch.no_grad()
def evaluate(trained: Trained, draw: bool = False) -> Evaluated:
    """Measure a model on data.val_path; `draw`: with the picture that a run draws of it. Raises UserError."""
    task, model, device = trained.task, trained.model, trained.device
    if task.validation is None:
        raise UserError("the run has no data.val_path: name labelled images with --data PATH")
    with Progress("evaluating", len(task.validation), "images") as progress:
        task.seen = progress.add
        found = task.evaluate(model, device)
    # Those of each class are in the details.
    measures = {key: value for key, value in found.items() if key in task.measures}
    details = task.details()
    return Evaluated(task.validation.name, measures, details, task.picture(model, device) if draw else None)


def predictor(trained: Trained, options: Options) -> Predictor[Any]:
    """Return what finds something in images with a trained model. Raises UserError where the task has nothing to find,
    or lacks an option that is given."""
    task = trained.task.recipe.task
    found = trained.task.predictor(trained.model, options)
    if found is None:
        raise UserError(
            f"a run of task={task} has nothing to predict: mimae embed writes its features, mimae reconstruct draws "
            "what it makes of hidden patches"
        )
    if strange := [
        name for name, value in options._asdict().items() if value is not None and name not in found.options
    ]:
        legal = " or ".join(f"--{name}" for name in sorted(found.options))
        raise UserError(f"--{strange[0]} is not for a run of task={task}, which has {legal}")
    return found


@torch.no_grad()
def predict(trained: Trained, finds: Predictor[Any], data: str, out: Path, overlays: Path | None = None) -> Predicted:
    """Write to `out` what is found in each image of a data set, or in one image, in order; `overlays`: a folder for
    pictures of it. One batch of images is in memory at a time. Raises UserError."""
    settings = trained.task.recipe.data
    source = images_at(data, settings)
    images, unread = 0, list[str]()
    count_unread = 0
    try:
        if overlays is not None:
            new_folder("--overlays", overlays)
        names = Names(source)
        with finds.writing(source, out) as write, Progress("predicting", len(source), "images") as progress:
            for batch in evaluation_batches(settings, source, finds.batch, reader=finds.reader):
                batch = batch.to(trained.device)
                progress.add(len(batch.images))
                read = (batch.source_ids == batch.sample_ids).tolist()
                for place, found in enumerate(finds.find(batch)):
                    i = int(batch.sample_ids[place])
                    write(i, found if read[place] else None)
                    if read[place] and overlays is not None:
                        file = overlays / names.of(i, ".jpg")
                        file.parent.mkdir(parents=True, exist_ok=True)
                        finds.drawn(batch.images[place].cpu(), found).save(file, quality=_JPEG_QUALITY)
                    images += 1
                    count_unread += not read[place]
                    unread += [source.path(i)] * (not read[place] and len(unread) < LISTED)
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
    return Predicted(images, count_unread, unread)


def images_at(path: str, settings: DataSettings) -> Source:
    """Return the images of a data path, or a single image file. Raises DataError."""
    file = user_path(path)
    if not (file.is_file() and is_image(path.encode(errors="surrogateescape"))):
        return open_source(path, settings=settings, use="held-out")
    name = file.name.encode(errors="surrogateescape")
    index = Index(np.frombuffer(name, np.uint8), np.array([0, len(name)]), None, None, [])
    return FileSource(path, file.parent, index, settings.max_bytes)
