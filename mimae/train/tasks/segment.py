"""The task of semantic segmentation: the class of each pixel is predicted, on a pretrained encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import SegmentRecipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import evaluation_batches
from mimae.data.sources.base import Source
from mimae.evaluate import share
from mimae.model.drop_path import keep_channels
from mimae.segmentation import overlays
from mimae.segmentation.examples import Central, Jittered, Whole
from mimae.segmentation.heads import AUXILIARY_WIDTH
from mimae.segmentation.labels import Labels
from mimae.segmentation.masks import Masks
from mimae.segmentation.measures import Evaluation, confusion
from mimae.segmentation.segmenter import Segmenter
from mimae.segmentation.windows import classes_at, slide
from mimae.train.predictors.base import Options
from mimae.train.predictors.segment import MaskPredictor
from mimae.train.task import Details, Result
from mimae.train.tasks.transfer import Transfer

PICTURED = 8
"""Number of images in a picture of overlays."""

_NAMED = 8
"""Maximal number of classes that a warning names."""


class Segment(Transfer[Segmenter]):
    """The task of segmentation: cross-entropy of pixels, evaluated by intersection over union on data.val_path."""

    recipe: SegmentRecipe
    losses = ("loss", "main", "auxiliary")
    measures = SegmentRecipe.measures
    found: Evaluation | None = None

    def check(self) -> None:
        super().check()
        _ = self.labels, self.masks, self.held_out

    @cached_property
    def labels(self) -> Labels:
        """The classes of the recipe."""
        return Labels.of(self.recipe.segment)

    @cached_property
    def masks(self) -> Masks:
        """The masks of the training images."""
        return self._masks(self.source, self.recipe.segment.masks, "segment.masks")

    @cached_property
    def held_out(self) -> Masks | None:
        """The masks of the validation images, or None."""
        if self.validation is None:
            return None
        return self._masks(self.validation, self.recipe.segment.val_masks, "segment.val_masks")

    def _masks(self, source: Source, folder: str | None, key: str) -> Masks:
        return Masks(source, folder, key, self.labels, self.recipe.data.max_pixels)

    def outline(self) -> Segmenter:
        with torch.device("meta"):
            return Segmenter(self.encoder(), self.recipe.segment)

    def reader(self) -> Jittered:
        recipe = self.recipe
        return Jittered(self.masks, recipe.data, recipe.segment, recipe.seed)

    def inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the inputs of `Segmenter.forward`."""
        recipe, settings = self.recipe, self.recipe.segment
        keep: list[Tensor | None] = [None, None]
        if settings.head == "upernet":
            stream = recipe.seed, batch.epoch, batch.sample_ids, settings.dropout
            keep = [keep_channels(*stream, settings.width), keep_channels(*stream, AUXILIARY_WIDTH, settings.width)]
        return (batch.images, batch.targets["classes"], self.paths(batch), *keep)

    def example(self, images: int) -> tuple[Tensor, Tensor]:
        return self.example_images(images), torch.empty(images, *self.recipe.data.size_hw, dtype=torch.int16)

    def result(self, output: Mapping[str, Tensor]) -> Result:
        loss = torch.stack(list(output.values())).sum()
        local = torch.stack([loss.detach(), *(each.detach() for each in output.values())])
        shown = distributed.all_sum(local) / distributed.world_size()
        return Result(loss, dict(zip(("loss", *output), shown)))

    # Evaluation

    def evaluate(self, model: Segmenter, device: torch.device) -> dict[str, float]:
        """Return the measures on data.val_path, and the intersection over union of each class that occurs."""
        if self.validation is None or self.held_out is None:
            return {}
        self.found = found = self._evaluation(model, self.validation, self.held_out, device)
        per_class = {key: value for key, value in zip(self._columns, found.per_class) if value is not None}
        return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy, **per_class}

    def details(self) -> Details | None:
        if self.found is None:
            return None
        classes = dict(zip(self.labels.names, self.found.per_class, strict=True))
        return Details(self.found.images, self.found.left_out, "iou", classes)

    def outputs(self) -> Sequence[str]:
        return self.labels.names

    def predictor(self, model: Segmenter, options: Options) -> MaskPredictor:
        return MaskPredictor(self.labels, partial(self._slide, model), self.recipe.data)

    def _evaluation(self, model: Segmenter, source: Source, masks: Masks, device: torch.device) -> Evaluation:
        """Evaluate the model on a source. This is a collective: each rank evaluates its share of the images."""
        data, classes = self.recipe.data, len(self.labels.names)
        table = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        ids = torch.arange(len(source))
        reader = Whole(masks, data)
        for batch, own in share.batches(data, source, ids, device, 1, reader):
            logits = self._slide(model, batch.images[0])
            # An image that cannot be read is replaced by another one, which is not counted here.
            is_read = torch.equal(batch.source_ids, batch.sample_ids)
            if own and is_read:
                true = batch.targets["classes"][0]
                table += confusion(true, classes_at(logits, (true.shape[0], true.shape[1])), classes)
            self.seen(own)
            counts += torch.tensor([own, own * (not is_read)], device=device)
        images, left_out = distributed.all_sum(counts).tolist()
        return Evaluation(distributed.all_sum(table).cpu(), images - left_out, left_out)

    def _slide(self, model: Segmenter, image: Tensor) -> Tensor:
        """Return logits fp32 (C, h, w) of an image uint8 (h, w, 3) at scale 1. This is a collective."""
        data = self.recipe.data
        paper = torch.tensor([round(255 * mean) for mean in data.mean], dtype=torch.uint8)

        def logits(images: Tensor) -> Tensor:
            return self._logits(model, images)

        return slide(logits, image, data.size_hw, self.recipe.segment.stride, paper)

    def _logits(self, model: Segmenter, images: Tensor) -> Tensor:
        """Return logits, computed in the run's precision."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model.logits(images)

    def picture(self, model: Segmenter, device: torch.device) -> bytes | None:
        """Return a PNG of overlays on images of the validation set, or else of the training set."""
        source, masks = self.source, self.masks
        if self.validation is not None and self.held_out is not None:
            source, masks = self.validation, self.held_out
        # Every rank takes the same images, because forwards are collectives under some engines.
        ids = share.evenly(source, PICTURED)
        reader = Central(masks, self.recipe.data)
        (batch,) = evaluation_batches(self.recipe.data, source, len(ids), ids, reader)
        batch = batch.to(device)
        found = self._logits(model, batch.images).argmax(1)
        if distributed.rank() > 0:
            return None
        return overlays.sheet(batch.images, batch.targets["classes"], found, self.labels.names)

    def warning(self, model: Segmenter, step: int, steps: int, steps_per_epoch: int) -> str | None:
        """Return the base class's warning and, at the end of the run, the classes that no pixel has."""
        left_out = super().warning(model, step, steps, steps_per_epoch)
        if self.found is None or step < steps or not (absent := self.found.absent):
            return left_out
        more = f" and {len(absent) - _NAMED} more" * (len(absent) > _NAMED)
        named = ", ".join(self.labels.names[i] for i in absent[:_NAMED]) + more
        return f"{f'{left_out};' if left_out else 'in data.val_path'} no pixel has the class {named}"

    @property
    def _columns(self) -> list[str]:
        """The columns of epochs.jsonl for the classes."""
        return [f"iou_{name}" for name in self.labels.names]

    @property
    def epoch_keys(self) -> tuple[str, ...]:
        return (*super().epoch_keys, *self._columns)
