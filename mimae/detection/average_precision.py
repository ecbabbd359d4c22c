"""Average precision of boxes and masks, by COCO's rules (faster-coco-eval)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mimae.data.pixels.decode import BadImage
from mimae.detection.coco import Category, Coco
from mimae.detection.settings import NAMES
from mimae.errors import UserError


def require() -> None:
    """Raise UserError if faster-coco-eval is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"detection needs faster-coco-eval ({error}): pip install 'mimae[detect]'") from error


def as_rows(
    found: Mapping[str, Tensor],
    image_id: int,
    categories: Sequence[Category],
    size: tuple[int, int],
    on_canvas: tuple[int, int],
) -> list[dict[str, Any]]:
    """Return the objects of an image in COCO's format of results.

    `found` is the output of `ViTDet.detect` for the image. `size` and `on_canvas` are its (height, width) in the file
    and on the canvas.
    """
    ratio = torch.tensor([size[1] / on_canvas[1], size[0] / on_canvas[0]], dtype=torch.float64)
    boxes = found["boxes"].cpu() * ratio.float().repeat(2)
    rows: list[dict[str, Any]] = []
    for box, label, score in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist()):
        left, top, right, bottom = box
        rows.append(
            {
                "image_id": image_id,
                "category_id": categories[label - 1][0],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
        )
    if "masks" in found and rows:
        masks = paste_masks_in_image(found["masks"].cpu().float(), boxes, size)
        for row, mask in zip(rows, masks[:, 0].numpy() > 0.5):
            runs = _encoded(mask)
            row["segmentation"] = {"size": list(runs["size"]), "counts": runs["counts"].decode()}
    return rows


class Precision(NamedTuple):
    """COCO's measures of a data set of images."""

    measures: dict[str, float]
    """box_ap, box_ap50, ..., and mask_ap, ... with masks. A measure is left out if there is no object (of its size)."""
    per_class: list[float | None]
    """box_ap of each class; None for one without an object."""


def average_precision(coco: Coco, images: Sequence[int], rows: list[dict[str, Any]], masks: bool) -> Precision:
    """Return COCO's numbers of some images of a set, of boxes and, with `masks`, of masks."""
    from faster_coco_eval import COCO, COCOeval_faster

    kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    measures: dict[str, float] = {}
    per_class: list[float | None] = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(_truth(coco, images, masks))
        for kind, name in kinds.items():
            judge = COCOeval_faster(truth, truth.loadRes(rows) if rows else COCO(_empty(truth)), name)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            numbers = dict(zip(NAMES, judge.stats[: len(NAMES)]))
            measures |= {f"{kind}_{key}": float(value) for key, value in numbers.items() if value >= 0}
            per_class = per_class or _per_class(judge.eval["precision"], judge.params.catIds, coco.categories)
    return Precision(measures, per_class)


def _per_class(precision: np.ndarray, ids: Sequence[int], categories: Sequence[Category]) -> list[float | None]:
    """Return the average precision of each class from COCO's table (IoUs, recalls, classes, sizes, most objects), where
    -1 is no object: all sizes, 100 objects. The table has the classes in the order of `ids`."""
    tables = dict(zip(ids, np.moveaxis(precision[:, :, :, 0, -1], 2, 0)))
    own = [tables[number] for number, _ in categories]
    return [float(table[table > -1].mean()) if (table > -1).any() else None for table in own]


def _truth(coco: Coco, images: Sequence[int], masks: bool) -> dict[str, Any]:
    """Return the annotations of images as a COCO dictionary, with masks as RLE."""
    annotations: list[dict[str, Any]] = []
    for i in images:
        objects = coco.objects[i]
        drawn = _runs(coco, i) if masks else None
        for place, (left, top, right, bottom) in enumerate(objects.boxes.tolist()):
            each: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": coco.image_ids[i],
                "category_id": coco.categories[objects.classes[place]][0],
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(objects.crowd[place]),
            }
            if drawn is not None:
                each["segmentation"], each["area"] = drawn[place]
            # COCO sorts objects by size with the area in the file, which is the polygons' area.
            if objects.areas[place] > 0:
                each["area"] = float(objects.areas[place])
            annotations.append(each)
    return {
        "images": [
            {"id": coco.image_ids[i], "height": coco.objects[i].height, "width": coco.objects[i].width} for i in images
        ],
        "categories": [{"id": number, "name": name} for number, name in coco.categories],
        "annotations": annotations,
    }


def _runs(coco: Coco, i: int) -> list[tuple[dict[str, Any], float]]:
    """Return the masks of an image as RLE, with their areas in pixels."""
    drawn = coco.masks(i, np.arange(len(coco.objects[i].boxes)))
    try:
        return [(_encoded(mask), float(mask.sum())) for mask in drawn]
    except BadImage as error:
        raise UserError(f"the masks of image {coco.image_ids[i]} of {coco.file}: {error}") from error


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask bool (height, width) as RLE, with `size` and `counts` (bytes)."""
    from faster_coco_eval.core import mask as coco_mask

    runs: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return runs


def _empty(truth: Any) -> dict[str, Any]:
    return {**truth.dataset, "annotations": []}
