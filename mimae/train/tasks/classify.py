"""The task of classification: a linear classifier is trained on an encoder, which is fine-tuned or frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mimae import distributed
from mimae.config.recipe import ClassifyRecipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.examples import Reader
from mimae.data.loading.readers import Augmented, Central
from mimae.data.pixels import mix
from mimae.data.pixels.erase import erase
from mimae.data.pixels.rand_augment import RandAugment
from mimae.data.sources.base import Source
from mimae.errors import UserError
from mimae.evaluate import share
from mimae.evaluate.classes import Classes
from mimae.model.classifier import Classifier
from mimae.telemetry import confusion
from mimae.train import frozen
from mimae.train.predictors.base import Options
from mimae.train.predictors.classify import ClassPredictor
from mimae.train.task import Details, Result
from mimae.train.tasks.transfer import Transfer

_BATCH = 128
_LISTED = 5
"""Maximal number of names in a note."""


class Evaluation(NamedTuple):
    """The result of a classifier on labelled images."""

    images: int
    confusion: Tensor
    """int64 (C, C) on the CPU: number of images by true class (row) and predicted class (column)."""
    top5: float
    loss: float
    left_out: int
    """Images that could not be read."""

    @property
    def top1(self) -> float:
        """The share of the images whose predicted class is right."""
        return self.confusion.diagonal().sum().item() / max(self.images, 1)

    def per_class(self) -> list[float | None]:
        """Return the share of right predictions for each class; None for a class without images."""
        counts, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [found / count if count else None for found, count in zip(right, counts)]


class Classify(Transfer[Classifier]):
    """The task of classification: cross-entropy on augmented images, evaluated by accuracy on data.val_path."""

    recipe: ClassifyRecipe
    measures = ClassifyRecipe.measures
    found: Evaluation | None = None
    """The last evaluation since the last step, which the picture shows too."""
    held: list[tuple[Batch, int]] | None = None
    """This rank's batches of data.val_path with features of a frozen encoder in place of images, in a run; none before
    its first evaluation."""

    @cached_property
    def classes(self) -> Classes:
        """The classes of the training set."""
        return Classes.of(self.source)

    @cached_property
    def labels(self) -> Tensor:
        """The class of each training image, int64 (n,)."""
        return self.classes.places(self.source)

    def check(self) -> None:
        super().check()
        _ = self.labels, self.reader()
        if self.validation is not None:
            self.classes.places(self.validation)  # This raises UserError for classes that the training set lacks.
        schedule = self.recipe.schedule
        each = schedule.batch_size // (schedule.accumulate * distributed.world_size())
        if self.recipe.augment.mixes and each % 2:
            raise UserError(
                f"mixup and cutmix mix pairs of images, but a micro-batch of one rank has {each} (schedule.batch_size="
                f"{schedule.batch_size}, {distributed.world_size()} ranks, schedule.accumulate={schedule.accumulate}); "
                "legal are even numbers, or augment.mix=0"
            )

    def notes(self) -> Iterator[str]:
        yield f"{len(self.classes)} classes"
        for source, what in ((self.source, "data.path"), (self.validation, "data.val_path")):
            missing = [] if source is None else self.classes.missing(self.classes.places(source))
            if missing:
                more = ", ..." * (len(missing) > _LISTED)
                yield f"{what} has no image of {len(missing)} classes: {', '.join(missing[:_LISTED])}{more}"
        if self._has_fixed_features:
            mib = self._feature_bytes / 2**20
            taken = f"the features of {len(self.source):,} images take {mib:,.1f} MiB on each rank"
            yield (
                f"{taken}: the frozen encoder computes them once, before the first step"
                if self.features is not None
                else f"{taken}, more than {frozen.LIMIT / 2**20:,.0f}: the frozen encoder computes them in every epoch"
            )

    def kept(self) -> dict[str, Any]:
        return {"classes": self.classes.state()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.classes = Classes.read(kept["classes"])

    def outline(self) -> Classifier:
        with torch.device("meta"):
            return self.model(len(self.classes))

    def model(self, classes: int) -> Classifier:
        """Return the classifier, built on torch's default device."""
        head = self.recipe.head
        return Classifier(self.encoder(), classes, pooling=head.pooling, norm=head.norm, init_std=head.init_std)

    # A step

    def reader(self) -> Reader | None:
        data, magnitude = self.recipe.data, self.recipe.augment.rand_augment
        if magnitude is None:
            return None
        augment = RandAugment(magnitude, self.recipe.augment.rand_augment_std, data.mean, data.size_hw)
        return Augmented(data, self.recipe.seed, augment)

    @cached_property
    def features(self) -> frozen.Features | None:
        """The features of the training images, where they are the same in every epoch."""
        if not self._has_fixed_features or self._feature_bytes > frozen.LIMIT:
            return None
        return frozen.Features(self.source, self.recipe.model.width)

    @property
    def _has_fixed_features(self) -> bool:
        """True if the encoder is frozen and sees every image in the same way in every epoch."""
        data, augment, finetune = self.recipe.data, self.recipe.augment, self.recipe.finetune
        is_plain = data.crop_scale is None and not data.flip and augment.rand_augment is None and not augment.erase
        return finetune.freeze == "all" and is_plain and not augment.mixes and not finetune.drop_path

    @property
    def _feature_bytes(self) -> int:
        return frozen.size(len(self.source), self.recipe.model.width)

    def backend(self) -> frozen.Features | None:
        return self.features

    def prepare(self, model: Classifier, device: torch.device) -> None:
        """Compute the features of the training images, where they are the same in every epoch."""
        source, width = self.validation, self.recipe.model.width
        if self.recipe.finetune.freeze == "all" and source is not None:
            self.held = [] if frozen.size(len(source), width) <= frozen.LIMIT * distributed.world_size() else None
        if self.features is not None:
            self.features.compute(self.recipe.data, partial(self._pooled, model), device)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return images (B, H, W, 3) or their features (B, D), targets (B, C) and, with drop path, the factors of the
        paths."""
        recipe, augment = self.recipe, self.recipe.augment
        images = batch.images
        self.labels = self.labels.to(images.device)
        targets = mix.soft_labels(self.labels[batch.source_ids], len(self.classes), augment.label_smoothing)
        if augment.erase or augment.mixes:
            mean, std = (images.new_tensor(each, dtype=torch.float32) for each in (recipe.data.mean, recipe.data.std))
            images = (images / 255 - mean) / std
        if augment.erase:
            images = erase(images, recipe.seed, batch.epoch, batch.sample_ids, augment.erase)
        if augment.mixes:
            pairs = mix.draw(recipe.seed, batch.epoch, batch.step, recipe.data.size_hw, augment)
            images, targets = pairs.images(images), pairs.labels(targets)
        paths = self.paths(batch)
        return (images, targets) if paths is None else (images, targets, paths)

    def example(self, images: int) -> tuple[Tensor, Tensor]:
        given = self.example_images(images) if self.features is None else torch.empty(images, self.recipe.model.width)
        return given, torch.empty(images, len(self.classes))

    def result(self, output: Tensor) -> Result:
        return Result(output, {"loss": distributed.all_sum(output) / distributed.world_size()})

    # At the end of an epoch

    def evaluate(self, model: Classifier, device: torch.device) -> dict[str, float]:
        """Return accuracy and loss on data.val_path, and top-5 accuracy if there are more than 5 classes."""
        if self.validation is None:
            return {}
        self.found = found = self._evaluation(model, self.validation, device)
        top5 = {"top5": found.top5} if len(self.classes) > 5 else {}
        return {"top1": found.top1, **top5, "val_loss": found.loss}

    def _evaluation(self, model: Classifier, source: Source, device: torch.device) -> Evaluation:
        """Evaluate a model on all readable images of a source. This is a collective."""
        places, ids, count = self.classes.places(source), torch.arange(len(source)), len(self.classes)
        table = torch.zeros(count * count, dtype=torch.int64, device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch, own in self._evaluated(model, source, ids, device):
            logits = self._logits(model, batch.images)[:own].float()
            # An image that cannot be read is replaced by another one, which is evaluated in its own place anyway.
            read = (batch.source_ids == batch.sample_ids)[:own]
            logits, labels = logits[read], places.to(device)[batch.source_ids[:own]][read]
            table += torch.bincount(labels * count + logits.argmax(1), minlength=count * count)
            in_five = (logits.topk(min(5, count)).indices == labels[:, None]).any(1)
            sums += torch.stack([in_five.sum().double(), F.cross_entropy(logits, labels, reduction="sum").double()])
            self.seen(own)
        table = distributed.all_sum(table).view(count, count).cpu()
        in_five, loss = distributed.all_sum(sums).tolist()
        images = int(table.sum())
        left_out = len(source) - images
        return Evaluation(images, table, in_five / max(images, 1), loss / max(images, 1), left_out)

    def _evaluated(
        self, model: Classifier, source: Source, ids: Tensor, device: torch.device
    ) -> Iterator[tuple[Batch, int]]:
        """Yield the batches of this rank's share of a source, with features in place of images if the run holds them.

        A frozen encoder computes them for the first evaluation.
        """
        if self.held:
            yield from ((batch.to(device), own) for batch, own in self.held)
            return
        for batch, own in share.batches(self.recipe.data, source, ids, device, _BATCH, self._central):
            if self.held is not None:
                batch = replace(batch, images=self._pooled(model, batch.images))
                self.held.append((batch.to("cpu"), own))
            yield batch, own

    def details(self) -> Details | None:
        if self.found is None:
            return None
        names = map(self.classes.name, range(len(self.classes)))
        accuracies = dict(zip(names, self.found.per_class(), strict=True))
        return Details(self.found.images, self.found.left_out, "accuracy", accuracies)

    def outputs(self) -> Sequence[str]:
        return [self.classes.name(place) for place in range(len(self.classes))]

    def predictor(self, model: Classifier, options: Options) -> ClassPredictor:
        return ClassPredictor(self.classes, partial(self._logits, model), self._central, options)

    @property
    def _central(self) -> Central:
        """Reads the window that is evaluated."""
        return Central(self.recipe.data, self.recipe.evaluation.crop)

    def _logits(self, model: Classifier, images: Tensor) -> Tensor:
        """Return logits (B, C) in the run's precision."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model.logits(images)

    def _pooled(self, model: Classifier, images: Tensor) -> Tensor:
        """Return what the classifier sees of images, (B, D), in the run's precision."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model.pooled(images)

    def picture(self, model: Classifier, device: torch.device) -> bytes | None:
        """Return the confusion matrix of data.val_path."""
        if self.validation is None:
            return None
        if self.found is None:
            self.evaluate(model, device)
        assert self.found is not None
        if distributed.rank() > 0:
            return None
        return confusion.matrix(self.found.confusion, [self.classes.name(i) for i in range(len(self.classes))])
