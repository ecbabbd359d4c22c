"""Pictures of the decoder's reconstruction of each view.

Letters in shapes: B images, N views, L patches, K visible, M targets, P patch size. Patch ids are row-major;
the values of a patch are ordered (row, column, channel).
"""

from __future__ import annotations

import colorsys
import io
import textwrap
from collections.abc import Container, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimae import kernels
from mimae.model.geometry import Grid

HIDDEN = (202, 208, 220)
"""Colour of a hidden patch: a bluish light grey, because neutral greys are common in photographs."""

_NORMALISED = (
    "The decoder predicts normalised patches; each has the brightness and contrast here that fit the original best."
)
_PAPER, _INK = (255, 255, 255), (70, 70, 76)
_PANEL = 128  # Smallest side of a panel in pixels; smaller images are enlarged.
_READABLE = 320  # Smallest side in pixels of an image with text in it.
_NARROW, _WIDE = 3, 14  # Gaps in pixels: inside a view and between rows; between views.


@torch.no_grad()
def reconstructions(
    images: Tensor,
    visible: Tensor,
    targets: Tensor,
    predictions: Tensor,
    *,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Return the visible part and the reconstruction of each view, each as uint8 (B, N, H, W, 3) on the CPU.

    images (B, H, W, 3) uint8, visible (B, N, K), targets (B, N, M), predictions (B, N, M, 3P^2) in the space of the
    reconstruction target. The first result has the visible patches on grey; the second also has the predictions at the
    places of the targets. With normalised targets (`normalize`) a prediction has no brightness and contrast: it gets
    those that bring it closest to the true patch (least squares, no negative contrast). The true contrast would turn
    the slight cast of a flat prediction into a strong colour wherever the true patch has an edge.
    """
    images, visible, targets = images.cpu(), visible.cpu().long(), targets.cpu().long()
    predicted = predictions.cpu().float()
    shift, scale = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    patches = kernels.patchify(images, patch, shift, scale)[:, None].expand(-1, visible.shape[1], -1, -1)
    if normalize:
        true = patches.gather(2, _places(targets, patches))
        brightness = true.mean(-1, keepdim=True)
        pattern = predicted - predicted.mean(-1, keepdim=True)
        contrast = (pattern * (true - brightness)).sum(-1, keepdim=True) / pattern.square().sum(-1, keepdim=True)
        predicted = brightness + contrast.nan_to_num(0).clamp_min(0) * pattern
    repeats = patch * patch
    colours = (predicted * scale.repeat(repeats) + shift.repeat(repeats)).clamp(0, 1)
    # Pixels of the visible patches are copied from the image, without arithmetic.
    originals = kernels.patchify(images, patch, torch.zeros(3), torch.ones(3)).mul(255).round().byte()
    originals = originals[:, None].expand(-1, visible.shape[1], -1, -1)
    masked = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(repeats).expand_as(originals).clone()
    shown = _places(visible, originals)
    masked.scatter_(2, shown, originals.gather(2, shown))
    rebuilt = masked.scatter(2, _places(targets, originals), colours.mul(255).round().byte())
    grid = Grid.of(images.shape[1:3], patch)
    return _unpatchify(masked, grid), _unpatchify(rebuilt, grid)


def reconstruction_grid(images: Tensor, masked: Tensor, rebuilt: Tensor, normalize: bool) -> bytes:
    """Return a PNG with a row for each image: the original, then each view and its reconstruction.

    `masked` and `rebuilt` are the results of `reconstructions` for `images`. `normalize` adds a line on them.
    """
    labels, panels = ["original"], [images.cpu()]
    for view in range(masked.shape[1]):
        labels += [f"view {view + 1}", f"reconstruction {view + 1}"]
        panels += [masked[:, view], rebuilt[:, view]]
    return sheet(labels, panels, wide=range(1, len(panels), 2), note=_NORMALISED if normalize else "")


def sheet(labels: Sequence[str], panels: Sequence[Tensor], wide: Container[int], note: str = "") -> bytes:
    """Return a PNG of columns with labels: panels uint8 (B, H, W, 3), with image b in row b.

    A wider gap precedes the columns in `wide`. Small images are enlarged by an integer factor, pixel by pixel.
    `note` stands below them.
    """
    count, height, width = panels[0].shape[:3]
    scale = max(1, -(-_PANEL // min(height, width)))
    letters = max(14, width * scale // 12)
    font, head = ImageFont.load_default(size=letters), 2 * letters
    lefts = [_WIDE]
    for column in range(1, len(panels)):
        lefts.append(lefts[-1] + width * scale + (_WIDE if column in wide else _NARROW))
    bottom, across = head + count * (height * scale + _NARROW) - _NARROW + _WIDE, lefts[-1] + width * scale + _WIDE
    lines = textwrap.wrap(note, max(20, int((across - 2 * _WIDE) / (0.55 * letters))))
    picture = Image.new("RGB", (across, bottom + len(lines) * 3 * letters // 2), _PAPER)
    draw = ImageDraw.Draw(picture)
    for left, label, panel in zip(lefts, labels, panels, strict=True):
        draw.text((left + width * scale / 2, head / 2), label, fill=_INK, font=font, anchor="mm")
        for row in range(count):
            tile = Image.fromarray(np.ascontiguousarray(panel[row].numpy()))
            tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            picture.paste(tile, (left, head + row * (height * scale + _NARROW)))
    for number, line in enumerate(lines):
        draw.text((_WIDE, bottom + number * 3 * letters // 2), line, fill=_INK, font=font)
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


def colours(number: int) -> np.ndarray:
    """Return a colour for each class, uint8 (number, 3): hues at golden-ratio steps, in three intensities."""
    found = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.6, 0.75)[i % 3], (0.95, 1.0, 0.7)[i % 3]) for i in range(number)
    ]
    return (np.array(found) * 255).round().astype(np.uint8)


def readable(image: Tensor) -> tuple[Tensor, int]:
    """Return an image (H, W, 3), enlarged by an integer factor if text would be large in it, and the factor."""
    scale = max(1, -(-_READABLE // min(image.shape[:2])))
    return image.repeat_interleave(scale, 0).repeat_interleave(scale, 1), scale


def _places(ids: Tensor, patches: Tensor) -> Tensor:
    """Return patch ids (B, N, M) as an index (B, N, M, 3P^2) into patches (B, N, L, 3P^2)."""
    return ids[..., None].expand(-1, -1, -1, patches.shape[-1])


def _unpatchify(patches: Tensor, grid: Grid) -> Tensor:
    """Return the images (B, N, H, W, 3) of patches (B, N, L, 3P^2)."""
    side = grid.patch_size
    tiles = patches.unflatten(3, (side, side, 3)).unflatten(2, (grid.rows, grid.columns))
    return tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)
