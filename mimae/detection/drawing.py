"""Pictures of objects: boxes, names and masks over an image.

Letters in shapes: H, W an image; n objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.utils import draw_segmentation_masks

from mimae.telemetry import pictures

SURE = 0.5
"""Smallest score of a detection that pictures show."""

_LETTERS, _LINE, _ALPHA, _DARK = 13, 2, 0.45, 140


def drawn(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    scores: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Return an image uint8 (H, W, 3) with boxes (n, 4), the names of their labels (n,), counted from 1, scores (n,)
    and masks bool (n, H, W).

    A class has one colour. Small images are enlarged, see `pictures.readable`. The first object is drawn last.
    """
    table = pictures.colours(len(classes))
    colours = [tuple(table[label - 1].tolist()) for label in labels.tolist()]
    if masks is not None and len(masks):
        planes = draw_segmentation_masks(image.permute(2, 0, 1), masks, alpha=_ALPHA, colors=colours)
        image = planes.permute(1, 2, 0)
    large, scale = pictures.readable(image)
    picture = Image.fromarray(np.ascontiguousarray(large.numpy()))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=_LETTERS)
    for i in reversed(range(len(colours))):
        left, top, right, bottom = (scale * boxes[i]).round().int().tolist()
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colours[i], width=_LINE)
        text = classes[int(labels[i]) - 1] + ("" if scores is None else f" {scores[i]:.2f}")
        wide, high = round(draw.textlength(text, font)) + 6, _LETTERS + 4
        left, top = max(0, min(left, picture.width - wide)), max(0, min(top, picture.height - high))
        draw.rectangle((left, top, left + wide, top + high), fill=colours[i])
        ink = (255, 255, 255) if sum(colours[i]) < 3 * _DARK else (0, 0, 0)
        draw.text((left + 3, top + high / 2), text, fill=ink, font=font, anchor="lm")
    return torch.from_numpy(np.array(picture))


def detected(image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """Return an image uint8 (H, W, 3) on the CPU, enlarged, with what `ViTDet.detect` is sure of in it."""
    sure = found["scores"] > SURE
    boxes, labels, scores = (found[name][sure].cpu() for name in ("boxes", "labels", "scores"))
    masks: Tensor | None = None
    if "masks" in found and len(boxes):
        size = (image.shape[0], image.shape[1])
        masks = torch.as_tensor(paste_masks_in_image(found["masks"][sure].cpu().float(), boxes, size)[:, 0] > 0.5)
    return drawn(image, boxes, labels, classes, scores, masks)
