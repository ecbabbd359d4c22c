"""The task of detection: a detector of objects, with boxes and masks, on a pretrained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from mimae import distributed
from mimae.config.recipe import DetectRecipe
from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.loader import evaluation_batches
from mimae.detection import average_precision as ap
from mimae.detection.coco import Coco
from mimae.detection.examples import DetectionReader
from mimae.detection.vitdet import LOSSES, ViTDet
from mimae.evaluate import share
from mimae.randomness import Purpose, words
from mimae.telemetry import pictures
from mimae.train.task import Result
from mimae.train.tasks.transfer import Transfer

PICTURED = 8
"""Number of images in a picture of detections."""

SURE = 0.5
"""Smallest score of the detections that a picture shows."""

_BATCH = 8


class Detect(Transfer[ViTDet]):
    """The task of detection: Mask R-CNN's losses, evaluated by COCO's average precision on data.val_path."""

    recipe: DetectRecipe
    losses = ("loss", *LOSSES)
    measures = DetectRecipe.measures

    def check(self) -> None:
        super().check()
        ap.require()
        settings, coco = self.recipe.detect, self.coco
        if settings.masks and not coco.has_masks():
            raise DataError(
                f"detect.annotations={coco.file} has objects without a mask: legal are detect.masks=false, or "
                "detect.panoptic with the folder of panoptic pictures"
            )
        if self.validation is not None and settings.val_annotations is None:
            raise DataError(f"data.val_path={self.validation.name} needs detect.val_annotations, its COCO file")
        if (held_out := self.held_out) is not None and held_out.categories != coco.categories:
            raise DataError(
                f"detect.val_annotations={held_out.file} and detect.annotations={coco.file} have different categories"
            )

    @cached_property
    def coco(self) -> Coco:
        """The annotations of the training images."""
        settings = self.recipe.detect
        if settings.annotations is None:
            raise DataError("detect.annotations=null: it has to name the COCO file of the images of data.path")
        return Coco(settings.annotations, "detect.annotations", self.source, settings.panoptic)

    @cached_property
    def held_out(self) -> Coco | None:
        """The annotations of the validation images, or None."""
        settings = self.recipe.detect
        if self.validation is None or settings.val_annotations is None:
            return None
        return Coco(settings.val_annotations, "detect.val_annotations", self.validation, settings.val_panoptic)

    def outline(self) -> ViTDet:
        with torch.device("meta"):
            return ViTDet(self.encoder(), self.recipe.detect, len(self.coco.categories))

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
        ids = torch.arange(len(validation))
        for batch, count in share.batches(recipe.data, validation, ids, device, _BATCH, reader):
            found = self._detect(model, batch)
            for i in range(count):
                sizes = batch.targets["source_size"][i].double() / batch.targets["size"][i]
                rows += ap.as_rows(coco, int(batch.source_ids[i]), found[i], (sizes[0].item(), sizes[1].item()))
        every = [row for part in distributed.gather_objects(rows) for row in part]
        return ap.average_precision(coco, range(len(validation)), every, recipe.detect.masks)

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
            names = [coco.classes[label - 1] for label in target["classes"][i, :number].tolist()]
            annotated.append(_drawn(image, target["boxes"][i, :number].cpu(), names))
            sure = found[i]["scores"] > SURE
            labels, scores = found[i]["labels"][sure].tolist(), found[i]["scores"][sure].tolist()
            names = [f"{coco.classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores)]
            detected.append(_drawn(image, found[i]["boxes"][sure].cpu(), names))
        return pictures.sheet(["annotated", "found"], [torch.stack(annotated), torch.stack(detected)], wide=())

    def _detect(self, model: ViTDet, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the detections, computed in the run's precision."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model.detect(batch.images, batch.targets["size"])


def _drawn(image: Tensor, boxes: Tensor, names: list[str]) -> Tensor:
    """Draw boxes with their names into an image uint8 (H, W, 3)."""
    if not names:
        return image
    drawn = draw_bounding_boxes(image.permute(2, 0, 1), boxes, names, colors="yellow", label_colors="yellow")
    return drawn.permute(1, 2, 0)
