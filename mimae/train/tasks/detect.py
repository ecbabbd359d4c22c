"""The task of detection: a detector of objects, with boxes and masks, on a pretrained encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import DetectRecipe
from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.loader import evaluation_batches
from mimae.detection import average_precision as ap
from mimae.detection import drawing
from mimae.detection.coco import Category, Coco, names_of
from mimae.detection.examples import DetectionReader
from mimae.detection.vitdet import LOSSES, ViTDet
from mimae.evaluate import share
from mimae.randomness import Purpose, words
from mimae.telemetry import pictures
from mimae.train.predictors.base import Options
from mimae.train.predictors.detect import ObjectPredictor
from mimae.train.task import Details, Result
from mimae.train.tasks.transfer import Transfer

PICTURED = 8
"""Number of images in a picture of detections."""

_BATCH = 8


class Detect(Transfer[ViTDet]):
    """The task of detection: Mask R-CNN's losses, evaluated by COCO's average precision on data.val_path."""

    recipe: DetectRecipe
    losses = ("loss", *LOSSES)
    measures = DetectRecipe.measures
    found: Details | None = None

    def check(self) -> None:
        super().check()
        ap.require()
        _ = self.coco, self.held_out

    def notes(self) -> Iterator[str]:
        yield f"{len(self.categories)} classes"
        for coco in (self.coco, self.held_out):
            if coco is None:
                continue
            yield f"{coco.key}: {coco.summary()}"
            if coco.outside:
                yield f"{coco.key}: {coco.outside:,} boxes are empty or outside of their images, and are left out"
            if coco.cut:
                yield f"{coco.key}: {coco.cut:,} boxes reach beyond their images, and are cut off there"

    def kept(self) -> dict[str, Any]:
        return {"categories": self.categories}

    def restore(self, kept: Mapping[str, Any]) -> None:
        if "categories" in kept:  # A run that is older has them in its annotations alone.
            self.categories = [(int(number), str(name)) for number, name in kept["categories"]]

    @cached_property
    def categories(self) -> list[Category]:
        """The categories that are detected, in the order of the model's outputs."""
        return self.coco.categories

    @cached_property
    def coco(self) -> Coco:
        """The annotations of the training images."""
        settings = self.recipe.detect
        if settings.annotations is None:
            raise DataError("detect.annotations=null: it has to name the COCO file of the images of data.path")
        coco = Coco(settings.annotations, "detect.annotations", self.source, settings.panoptic)
        return self._usable(coco, "detect.panoptic")

    @cached_property
    def held_out(self) -> Coco | None:
        """The annotations of the validation images, or None."""
        settings = self.recipe.detect
        if self.validation is None:
            return None
        if settings.val_annotations is None:
            raise DataError(f"data.val_path={self.validation.name} needs detect.val_annotations, its COCO file")
        place = settings.val_annotations, "detect.val_annotations", self.validation, settings.val_panoptic
        return self._usable(Coco(*place, self.categories), "detect.val_panoptic")

    def _usable(self, coco: Coco, panoptic_key: str) -> Coco:
        """Return the annotations. Raises DataError if masks are to be learned and an object has none.

        `panoptic_key` is the setting that names their folder of panoptic pictures.
        """
        if self.recipe.detect.masks and not coco.has_masks():
            raise DataError(
                f"{coco.key}={coco.file} has objects without a mask: legal are detect.masks=false, or "
                f"{panoptic_key} with the folder of panoptic pictures"
            )
        return coco

    def outline(self) -> ViTDet:
        with torch.device("meta"):
            return ViTDet(self.encoder(), self.recipe.detect, len(self.categories))

    def reader(self) -> DetectionReader:
        return DetectionReader(self.coco, self.recipe.data, self.recipe.detect, self.recipe.seed)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Return the inputs of `ViTDet.forward`.

        The samplers' seed depends on the first sample of the micro-batch, so the sampled anchors depend on the number
        of ranks.
        """
        found = batch.targets
        word = words(self.recipe.seed, Purpose.SAMPLER, batch.epoch, batch.sample_ids[:1], 1)[0, 0]
        named = (found[name] for name in ("size", "boxes", "classes", "count"))
        return (batch.images, *named, found.get("masks"), self.paths(batch), word)

    def example_loss(self, model: ViTDet) -> Tensor:
        """Return a number that depends on the maps, on all anchors, and on as many regions as the heads sample."""
        return model.example_loss(self.example_images(1))

    def result(self, output: Mapping[str, Tensor]) -> Result:
        loss = torch.stack(list(output.values())).sum()
        local = torch.stack([loss.detach(), *(each.detach() for each in output.values())])
        shown = distributed.all_sum(local) / distributed.world_size()
        return Result(loss, dict(zip(("loss", *output), shown)))

    def evaluate(self, model: ViTDet, device: torch.device) -> dict[str, float]:
        """Return COCO's average precision on data.val_path."""
        coco, validation, recipe = self.held_out, self.validation, self.recipe
        if coco is None or validation is None:
            return {}
        reader = DetectionReader(coco, recipe.data, recipe.detect, None)
        rows: list[dict[str, Any]] = []
        read: list[int] = []
        ids = torch.arange(len(validation))
        for batch, count in share.batches(recipe.data, validation, ids, device, _BATCH, reader):
            found, targets = self._detect(model, batch), batch.targets
            self.seen(count)
            for i, source_id in enumerate(batch.source_ids[:count].tolist()):
                if source_id == int(batch.sample_ids[i]):  # else another image stands for one that cannot be read
                    sizes = (tuple(targets[name][i].tolist()) for name in ("source_size", "size"))
                    rows += ap.as_rows(found[i], coco.image_ids[source_id], coco.categories, *sizes)
                    read.append(source_id)
        every = [row for part in distributed.gather_objects(rows) for row in part]
        images = sorted(i for part in distributed.gather_objects(read) for i in part)
        precision = ap.average_precision(coco, images, every, recipe.detect.masks)
        classes = dict(zip(coco.classes, precision.per_class))
        self.found = Details(len(images), len(validation) - len(images), "box_ap", classes)
        return precision.measures

    def details(self) -> Details | None:
        return self.found

    def outputs(self) -> Sequence[str]:
        return names_of(self.categories)

    def predictor(self, model: ViTDet, options: Options) -> ObjectPredictor:
        ap.require()
        return ObjectPredictor(self.categories, partial(self._detect, model), self.recipe.data)

    def picture(self, model: ViTDet, device: torch.device) -> bytes | None:
        """Return the first validation images, or else training images, with their annotated and detected objects."""
        recipe = self.recipe
        coco, source = (self.coco, self.source) if self.held_out is None else (self.held_out, self.validation)
        assert source is not None
        # Training examples have boxes; without jitter and flip the image is placed as in evaluation.
        plain = recipe.detect.model_copy(update={"scale": (1.0, 1.0)})
        data = recipe.data.model_copy(update={"flip": False})
        reader = DetectionReader(coco, data, plain, recipe.seed)
        ids = torch.arange(min(PICTURED, len(source)))
        # Every rank takes the same images, because forwards are collectives under some engines.
        batches = evaluation_batches(data, source, len(ids), ids, reader)
        (batch,) = (each.to(device) for each in batches)
        found = self._detect(model, batch)
        if distributed.rank() > 0:
            return None
        annotated, detected = [], []
        for i, image in enumerate(batch.images.cpu()):
            number, target = int(batch.targets["count"][i]), batch.targets
            boxes, labels = (target[name][i, :number].cpu() for name in ("boxes", "classes"))
            annotated.append(drawing.drawn(image, boxes, labels, coco.classes))
            detected.append(drawing.detected(image, found[i], coco.classes))
        return pictures.sheet(["annotated", "found"], [torch.stack(annotated), torch.stack(detected)], wide=())

    def _detect(self, model: ViTDet, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the detections, computed in the run's precision."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model.detect(batch.images, batch.targets["size"])
