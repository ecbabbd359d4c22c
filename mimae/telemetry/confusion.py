"""A picture of a confusion matrix."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PAPER, _INK, _LIGHT, _DARK = (255, 255, 255), (70, 70, 76), (236, 240, 247), (32, 74, 135)
_SIDE = 720
"""Pixels of the matrix, about."""
_NAMED = 40
"""Largest number of classes whose names are written."""
_NUMBERED = 20
"""Largest number of classes for which the cells have numbers."""
_LETTERS = 24


def matrix(counts: Tensor, names: Sequence[str]) -> bytes:
    """Return a PNG of counts (C, C), true classes by row and found ones by column: the darker a cell, the larger its
    share of its row. Up to 20 classes cells have their percentages, up to 40 the axes have names."""
    rows = counts.double().numpy()
    shares = rows / np.maximum(rows.sum(1, keepdims=True), 1)
    count = len(names)
    cell = max(1, _SIDE // count)
    short = [name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…" for name in names]
    font = ImageFont.load_default(size=max(9, min(16, int(cell * 0.45))))
    margin = 40 + (int(max(map(font.getlength, short))) if count <= _NAMED else 0)
    side = cell * count
    picture = Image.new("RGB", (margin + side + 16, margin + side + 16), _PAPER)
    light, dark = np.array(_LIGHT), np.array(_DARK)
    colours = np.rint(light + shares[..., None] * (dark - light)).astype(np.uint8)
    picture.paste(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    draw, title = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    draw.text((margin + side / 2, 14), "found", fill=_INK, font=title, anchor="mm")
    _write_upright(picture, "true", (14, margin + side // 2), title)
    for place, name in enumerate(short if count <= _NAMED else ()):
        middle = margin + cell * (place + 0.5)
        draw.text((margin - 6, middle), name, fill=_INK, font=font, anchor="rm")
        _write_upright(picture, name, (int(middle), margin - 6), font, is_above=True)
    for row, column in np.ndindex(count, count) if count <= _NUMBERED else ():
        percent = round(100 * shares[row, column])
        if percent:
            at = margin + cell * (column + 0.5), margin + cell * (row + 0.5)
            draw.text(at, str(percent), fill=_PAPER if percent > 45 else _INK, font=font, anchor="mm")
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


def _write_upright(
    picture: Image.Image,
    text: str,
    at: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    is_above: bool = False,
) -> None:
    """Write from bottom to top, centred at a point or right above it."""
    width, height = int(font.getlength(text)) + 2, int(1.5 * sum(font.getbbox("Hg")[3:]))
    tile = Image.new("RGB", (width, height), _PAPER)
    ImageDraw.Draw(tile).text((1, height / 2), text, fill=_INK, font=font, anchor="lm")
    tile = tile.rotate(90, expand=True)
    left, top = at[0] - height // 2, at[1] - (width if is_above else width // 2)
    picture.paste(tile, (left, top))
