"""Pictures of segmentation: images with classes as coloured overlays, and a legend.

Letters in shapes: B images, H, W their pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimae.telemetry import pictures

_STRENGTH = 0.6
"""Share of a class's colour in an overlay."""

_SQUARE, _LINE, _PAPER, _INK = 14, 22, (255, 255, 255), (70, 70, 76)


def overlay(images: Tensor, classes: Tensor, number: int) -> Tensor:
    """Return images uint8 (B, H, W, 3) with the colours of their classes (B, H, W) as overlays.

    Ignored pixels (classes below 0) have no overlay and are grey.
    """
    images, classes = images.cpu().float(), classes.cpu().long()
    table = torch.from_numpy(pictures.colours(number)).float()
    mixed = images * (1 - _STRENGTH) + table[classes.clamp(min=0)] * _STRENGTH
    grey = images.mean(-1, keepdim=True).expand_as(images)
    return torch.where((classes < 0)[..., None], grey, mixed).round().byte()


def sheet(images: Tensor, classes: Tensor, found: Tensor, names: Sequence[str]) -> bytes:
    """Return a PNG with a row for each image (image, annotated classes, predicted classes) and a legend.

    Shapes: images uint8 (B, H, W, 3), annotated `classes` and predicted classes `found` (B, H, W).
    """
    panels = [images.cpu(), *(overlay(images, each, len(names)) for each in (classes, found))]
    png = pictures.sheet(["image", "annotated", "found"], panels, wide=())
    present = [i for i in torch.cat([classes.cpu().flatten(), found.cpu().flatten()]).unique().tolist() if i >= 0]
    out = io.BytesIO()
    with_legend(Image.open(io.BytesIO(png)).convert("RGB"), present, names).save(out, "PNG")
    return out.getvalue()


def with_legend(picture: Image.Image, present: Sequence[int], names: Sequence[str]) -> Image.Image:
    """Return the picture with a legend below it: the colours and names of the classes `present`."""
    font, table = ImageFont.load_default(size=_SQUARE), pictures.colours(len(names))
    measure = ImageDraw.Draw(picture)
    places, left, line, across = [], _SQUARE, 0, picture.width
    for number in present:
        width = 3 * _SQUARE + round(measure.textlength(names[number], font))
        if left > _SQUARE and left + width > picture.width:
            left, line = _SQUARE, line + 1
        places.append((number, left, line))
        left += width
        across = max(across, left)
    whole = Image.new("RGB", (across, picture.height + (line + 1) * _LINE), _PAPER)
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for number, left, line in places:
        top = picture.height + line * _LINE
        draw.rectangle((left, top, left + _SQUARE, top + _SQUARE), fill=tuple(table[number].tolist()))
        draw.text((left + _SQUARE + 5, top + _SQUARE / 2), names[number], fill=_INK, font=font, anchor="lm")
    return whole
