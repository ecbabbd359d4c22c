"""Pictures of objects: boxes, names and masks over an image.

Letters in shapes: H, W an image; n objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

SURE = 0.5
"""Smallest score of a detection that pictures show."""

_MASK = "orange"


def drawn(image: Tensor, boxes: Tensor, names: Sequence[str], masks: Tensor | None = None) -> Tensor:
    """Return an image uint8 (H, W, 3) with boxes (n, 4), their names, and masks bool (n, H, W)."""
    if not names:
        return image
    planes = image.permute(2, 0, 1)
    if masks is not None:
        planes = draw_segmentation_masks(planes, masks.any(0, keepdim=True), alpha=0.4, colors=_MASK)
    planes = draw_bounding_boxes(planes, boxes, list(names), colors="yellow", label_colors="yellow")
    return planes.permute(1, 2, 0).contiguous()


def detected(image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """Return an image uint8 (H, W, 3) on the CPU with what `ViTDet.detect` is sure of in it."""
    sure = found["scores"] > SURE
    boxes, labels, scores = (found[name][sure].cpu() for name in ("boxes", "labels", "scores"))
    names = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels.tolist(), scores.tolist())]
    masks: Tensor | None = None
    if "masks" in found and len(boxes):
        size = (image.shape[0], image.shape[1])
        masks = paste_masks_in_image(found["masks"][sure].cpu().float(), boxes, size)[:, 0] > 0.5
    return drawn(image, torch.as_tensor(boxes), names, masks)
