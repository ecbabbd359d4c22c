"""Pictures of a model's outputs: reconstructions, nearest neighbours, a map of features.

Letters in shapes: n samples, B images, D features.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mimae import kernels
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import evaluation_batches
from mimae.data.loading.order import spread_ids
from mimae.data.pixels.augment import centre_window
from mimae.data.pixels.decode import BadImage, decode, why
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.endings import is_image
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.evaluate.features import extract
from mimae.evaluate.samples import standardise
from mimae.model.masking import views
from mimae.outside.progress import Progress
from mimae.telemetry import pictures
from mimae.transfer.load import load, load_model

_EACH = 8
"""Number of images of a data set that are shown."""
_PAPER, _INK, _RIGHT, _WRONG = "#ffffff", "#46464c", "#2b8a3e", "#c92a2a"
_CLASSES = 20
"""Maximal number of classes that colours can distinguish."""
_CELLS = np.array([18, 18])
"""Columns and rows of images in a map."""


class Reconstruction(NamedTuple):
    """A picture with one row per image, and the names and losses of the images in the order of the rows."""

    png: bytes
    names: list[str]
    losses: list[float]
    """L_rec of each image, averaged over its views."""


@torch.no_grad()
def reconstruct(run: Path, paths: Sequence[str], average: bool = False) -> Reconstruction:
    """Mask images as the run does, and draw the model's predictions of the hidden patches.

    `paths` are image files, or data sets, of which some images are used. Raises UserError if they cannot be read.
    """
    recipe, model, _ = load_model(run, average)
    pairs = [pair for path in paths for pair in _images(path, recipe.data)]
    images = torch.stack([pixels for _, pixels in pairs])
    visible, targets = views(recipe, recipe.seed, 0, torch.arange(len(images)))
    predictions = model.predict(images, visible, targets)
    data, normalize = recipe.data, recipe.objective.normalize_pixels
    mean, std = model.encoder.mean, model.encoder.std
    losses = [
        float(kernels.pixel_loss(predictions[i : i + 1], images[i : i + 1], each[None], mean, std, normalize))
        / each.numel()
        for i, each in enumerate(targets)
    ]
    drawn = pictures.reconstructions(
        *(images, visible, targets, predictions),
        patch=recipe.model.patch_size,
        mean=data.mean,
        std=data.std,
        normalize=normalize,
    )
    png = pictures.reconstruction_grid(images, *drawn, normalize)
    return Reconstruction(png, [name for name, _ in pairs], losses)


def _images(path: str, data: DataSettings) -> list[tuple[str, Tensor]]:
    """Return names and pixels, uint8 (H, W, 3), of an image file or of some images of a data set."""
    if Path(path).is_file() and is_image(path.encode()):
        try:
            pixels = decode(
                Path(path).read_bytes(),
                lambda height, width: centre_window(height, width, data.size_hw),
                data.size_hw,
                max_pixels=data.max_pixels,
                white=data.range,
            )
        except (BadImage, OSError) as error:
            raise UserError(f"{path} cannot be shown: {why(error)}") from error
        return [(path, torch.from_numpy(pixels))]
    source = open_source(path, settings=data)
    (batch,) = _batch(source, data, spread_ids(len(source), _EACH))
    return [(source.path(i), pixels) for i, pixels in zip(batch.source_ids.tolist(), batch.images)]


class Bank(NamedTuple):
    """The features of some images of a data set."""

    source: Source
    data: DataSettings
    ids: Tensor
    """int64 (n,)."""
    features: Tensor
    """float32 (n, D); each feature has mean 0 and variance 1."""

    def images(self, rows: Tensor) -> Tensor:
        """Return the pixels of rows (B,) of the bank, uint8 (B, H, W, 3)."""
        (batch,) = _batch(self.source, self.data, self.ids[rows])
        return batch.images

    def classes(self) -> list[str] | None:
        """Return the name of each row's class, or None if the source has no classes."""
        if self.source.labels is None:
            return None
        labels = self.source.labels[self.ids.numpy()]
        return [self.source.classes[i] if self.source.classes else str(i) for i in labels.tolist()]


def bank(weights: Path, path: str, limit: int, average: bool = False) -> Bank:
    """Return the features of at most `limit` images, evenly spread over a data set. Raises UserError."""
    encoder, data, _ = load(weights, average)
    source = open_source(path, settings=data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractors = {"encoder": encoder.to(device).features}
    chosen = spread_ids(len(source), limit)
    with Progress("features", len(chosen), "images") as progress:
        found, ids = extract(extractors, data, source, chosen, device, progress.add)
    if len(ids) < 2:
        raise UserError(f"{path} has {len(ids)} images that can be read: a comparison needs at least two")
    (features,) = standardise(found["encoder"].cpu())
    return Bank(source, data, ids.cpu(), features)


def neighbours(found: Bank, queries: int, nearest: int) -> bytes:
    """Return a PNG with a row for each of `queries` images, evenly spread, and its nearest images by cosine similarity.

    Below each image are its similarity and, if there are classes, its class: green if it is the query's, else red.
    """
    rows = spread_ids(len(found.ids), queries)
    unit = F.normalize(found.features, dim=1)
    cosine = unit[rows] @ unit.T
    cosine[torch.arange(len(rows)), rows] = -torch.inf  # An image is no neighbour of itself.
    values, near = cosine.topk(min(nearest, len(found.ids) - 1), dim=1)
    shown = torch.cat([rows[:, None], near], 1)
    images = found.images(shown.flatten()).unflatten(0, tuple(shown.shape))
    names = found.classes()
    scale = max(1, -(-96 // min(images.shape[2:4])))
    height, width = images.shape[2] * scale, images.shape[3] * scale
    letters = 12
    font, line = ImageFont.load_default(size=letters), letters + 4
    text_height = line * (1 if names is None else 2) + 6
    gap, apart = 6, 22
    across = shown.shape[1] * (width + gap) + apart
    picture = Image.new("RGB", (across + gap, len(rows) * (height + text_height) + 2 * line), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((gap, 4), "query", fill=_INK, font=font)
    draw.text(
        (width + 2 * gap + apart, 4), "nearest other images by cosine of their features, left to right", _INK, font
    )
    for row, ids in enumerate(shown.tolist()):
        for column, i in enumerate(ids):
            left = gap + column * (width + gap) + (apart if column else 0)
            top = line + 6 + row * (height + text_height)
            tile = Image.fromarray(images[row, column].numpy()).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (left, top))
            words = ["" if column == 0 else f"{values[row, column - 1]:.2f}"]
            colour = _INK
            if names is not None:
                words = [_fitted(draw, names[i], width, font), *words]
                colour = _INK if column == 0 else _RIGHT if names[i] == names[ids[0]] else _WRONG
            for number, word in enumerate(words):
                draw.text((left, top + height + 2 + number * line), word, fill=colour, font=font)
    return _png(picture)


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """Return the text, shortened to `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def feature_map(found: Bank) -> bytes:
    """Return a PNG of the features in the plane of their first two principal components.

    The left panel has a dot for each image, in the colour of its class if there are at most twenty classes. The right
    panel has the images themselves at their positions.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    u, s, _ = torch.linalg.svd(found.features.double(), full_matrices=False)
    points, shares = (u * s)[:, :2].numpy(), (s.square() / s.square().sum()).tolist()
    low, high = points.min(0), points.max(0) + 1e-9
    names = found.classes()
    distinct = sorted(set(names or ()))
    figure = Figure(figsize=(16, 8), dpi=100, layout="constrained")
    dots, tiles = figure.subplots(1, 2, sharex=True, sharey=True)
    if names is not None and len(distinct) <= _CLASSES:
        colours = colormaps["tab10" if len(distinct) <= 10 else "tab20"]
        for number, name in enumerate(distinct):
            of = np.array([each == name for each in names])
            dots.scatter(points[of, 0], points[of, 1], s=14, color=colours(number), label=name, linewidths=0)
        handles, labels = dots.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside left center", frameon=False, markerscale=2)
    else:
        dots.scatter(points[:, 0], points[:, 1], s=14, color="#5c7cfa", alpha=0.6, linewidths=0)
    side = (high - low) / _CELLS
    cells, rows = _nearest_to_centres((points - low) / side)
    for cell, pixels in zip(cells, found.images(rows).numpy(), strict=True):
        left, bottom = low + cell * side
        place = (left, left + side[0], bottom, bottom + side[1])
        tiles.imshow(pixels, extent=place, aspect="auto", interpolation="nearest")
    dots.set(
        xlim=(low[0], high[0]),
        ylim=(low[1], high[1]),
        xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
        ylabel=f"second principal component ({shares[1]:.0%})",
        title=f"{len(found.ids):,} images by their features",
    )
    tiles.set(xlabel=dots.get_xlabel(), title="the image in the middle of each field")
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _nearest_to_centres(points: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Return the unit cells (m, 2) that contain points (n, 2), and the point nearest to each cell's centre."""
    cells = np.floor(points).astype(int)
    order = np.argsort(np.abs(points - cells - 0.5).max(1), kind="stable")
    distinct, firsts = np.unique(cells[order], axis=0, return_index=True)
    return distinct, torch.from_numpy(order[firsts])


def _batch(source: Source, data: DataSettings, ids: Tensor) -> Iterator[Batch]:
    """Yield one batch with all of these samples."""
    return evaluation_batches(data.model_copy(update={"workers": 0}), source, len(ids), ids)


def _png(picture: Image.Image) -> bytes:
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()
