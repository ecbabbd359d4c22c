"""Average precision of boxes and masks, by COCO's rules (faster-coco-eval)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mimae.data.pixels.decode import BadImage
from mimae.detection.coco import Coco
from mimae.detection.settings import NAMES
from mimae.errors import UserError


def require() -> None:
    """Raise UserError if faster-coco-eval is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"detection needs faster-coco-eval ({error}): pip install 'mimae[detect]'") from error


def as_rows(coco: Coco, i: int, found: dict[str, Tensor], ratio: tuple[float, float]) -> list[dict[str, Any]]:
    """Return the detections of image `i` in COCO's format of results.

    `found` is the output of `ViTDet.detect` for the image. `ratio` is the (height, width) of a canvas pixel in pixels
    of the image.
    """
    from faster_coco_eval.core import mask as coco_mask

    objects = coco.objects[i]
    boxes = found["boxes"].cpu() * torch.tensor([ratio[1], ratio[0]]).repeat(2)
    rows: list[dict[str, Any]] = []
    for box, label, score in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist()):
        left, top, right, bottom = box
        rows.append(
            {
                "image_id": coco.image_ids[i],
                "category_id": coco.categories[label - 1][0],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
        )
    if "masks" in found and rows:
        masks = paste_masks_in_image(found["masks"].cpu().float(), boxes, (objects.height, objects.width))
        for row, mask in zip(rows, masks[:, 0].numpy() > 0.5):
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            row["segmentation"] = {"size": list(runs["size"]), "counts": runs["counts"].decode()}
    return rows


def average_precision(coco: Coco, images: Sequence[int], rows: list[dict[str, Any]], masks: bool) -> dict[str, float]:
    """Return COCO's measures for `images` of a data set: box_ap, box_ap50, ..., and with `masks` mask_ap, ...

    A measure is left out if there is no object (of its size).
    """
    from faster_coco_eval import COCO, COCOeval_faster

    kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    measures: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(_truth(coco, images, masks))
        for kind, name in kinds.items():
            judge = COCOeval_faster(truth, truth.loadRes(rows) if rows else COCO(_empty(truth)), name)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            numbers = dict(zip(NAMES, judge.stats[: len(NAMES)]))
            measures |= {f"{kind}_{key}": float(value) for key, value in numbers.items() if value >= 0}
    return measures


def _truth(coco: Coco, images: Sequence[int], masks: bool) -> dict[str, Any]:
    """Return the annotations of images as a COCO dictionary, with masks as RLE."""
    from faster_coco_eval.core import mask as coco_mask

    annotations: list[dict[str, Any]] = []
    for i in images:
        objects = coco.objects[i]
        drawn: np.ndarray | None = None
        if masks:
            try:
                drawn = coco.masks(i, np.arange(len(objects.boxes)))
            except BadImage as error:
                raise UserError(f"the masks of image {coco.image_ids[i]} of {coco.file}: {error}") from error
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
                runs = coco_mask.encode(np.asfortranarray(drawn[place].astype(np.uint8)))
                each |= {"segmentation": runs, "area": float(drawn[place].sum())}
            annotations.append(each)
    return {
        "images": [
            {"id": coco.image_ids[i], "height": coco.objects[i].height, "width": coco.objects[i].width} for i in images
        ],
        "categories": [{"id": number, "name": name} for number, name in coco.categories],
        "annotations": annotations,
    }


def _empty(truth: Any) -> dict[str, Any]:
    return {**truth.dataset, "annotations": []}
