"""Fuzzing of images of every format with all CPU decoders: one damaged image among intact ones."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from mimae.bench.harness.fuzz.case import Case
from mimae.bench.harness.fuzz.draws import damaged
from mimae.bench.harness.fuzz.forked import Wrong
from mimae.bench.harness.fuzz.formats import boxes, jpeg, png, tiff
from mimae.bench.harness.fuzz.kind import Kind
from mimae.data.loading.backend import OBSTACLES
from mimae.data.loading.batch import Batch
from mimae.data.loading.dali import RegionDecoder
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.samples import Decoder, EachDecoder, make_batch
from mimae.data.pixels import jpeg as libjpeg
from mimae.data.pixels.decode import BadImage, look
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.data.tools.check import _look_at

Change = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

MOST_PIXELS = 1_000_000
"""data.max_pixels of this kind. It is far below MEMORY, so that trust in a larger size of a header is detected."""

_SOUND = ("0.png", "2.png")


@lru_cache(1)
def bases() -> list[tuple[str, bytes, Change]]:
    """Return intact images of all formats that this Pillow writes: name, content, and format-aware damage."""
    draw = np.random.default_rng(0)
    grey = draw.integers(0, 256, (20, 24), dtype=np.uint8)
    noise = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    colour = Image.fromarray(noise)
    alpha = Image.fromarray(np.dstack([noise, grey]))
    deep = Image.fromarray((grey.astype(np.uint16) << 8) | 7)
    others = [Image.fromarray(np.roll(noise, i, 0)) for i in (3, 6)]
    exif = Image.Exif()
    exif[0x0112] = 6

    def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    made: list[tuple[str, Callable[[], bytes], Change]] = [
        ("baseline.jpg", lambda: encoded(colour, "JPEG"), jpeg),
        ("progressive.jpg", lambda: encoded(colour, "JPEG", progressive=True), jpeg),
        ("turned.jpg", lambda: encoded(colour, "JPEG", exif=exif, restart_marker_rows=1), jpeg),
        ("grey.jpg", lambda: encoded(Image.fromarray(grey), "JPEG"), jpeg),
        ("cmyk.jpg", lambda: encoded(colour.convert("CMYK"), "JPEG"), jpeg),
        ("several.mpo", lambda: encoded(colour, "MPO", save_all=True, append_images=others), jpeg),
        ("colour.png", lambda: encoded(colour, "PNG"), png),
        ("alpha.png", lambda: encoded(alpha, "PNG"), png),
        ("deep.png", lambda: encoded(deep, "PNG"), png),
        ("palette.png", lambda: encoded(colour.quantize(16), "PNG", transparency=3), png),
        ("moving.apng", lambda: encoded(colour, "PNG", save_all=True, append_images=others), png),
        ("lossy.webp", lambda: encoded(colour, "WEBP"), boxes),
        ("lossless.webp", lambda: encoded(alpha, "WEBP", lossless=True), boxes),
        ("moving.webp", lambda: encoded(colour, "WEBP", save_all=True, append_images=others), boxes),
        ("plain.tif", lambda: encoded(colour, "TIFF"), tiff),
        ("packed.tif", lambda: encoded(alpha, "TIFF", compression="tiff_lzw"), tiff),
        ("jpeg.tif", lambda: encoded(colour, "TIFF", compression="jpeg"), tiff),
        ("deflated.tif", lambda: encoded(deep, "TIFF", compression="tiff_adobe_deflate"), tiff),
        ("fax.tif", lambda: encoded(colour.convert("1"), "TIFF", compression="group4"), tiff),
        ("still.gif", lambda: encoded(colour, "GIF"), damaged),
        ("moving.gif", lambda: encoded(colour, "GIF", save_all=True, append_images=others), damaged),
        ("colour.bmp", lambda: encoded(colour, "BMP"), damaged),
        ("palette.dib", lambda: encoded(colour.quantize(16), "DIB"), damaged),
        ("colour.ppm", lambda: encoded(colour, "PPM"), damaged),
        ("deep.pgm", lambda: encoded(deep, "PPM"), damaged),
        ("bits.pbm", lambda: encoded(colour.convert("1"), "PPM"), damaged),
        ("colour.jp2", lambda: encoded(colour, "JPEG2000"), boxes),
        ("tiles.j2k", lambda: encoded(colour, "JPEG2000", tile_size=(8, 8)), boxes),
        ("colour.avif", lambda: encoded(colour, "AVIF", speed=10), boxes),
    ]
    found = []
    for name, make, change in made:
        try:
            found.append((name, make(), change))
        except (OSError, KeyError):  # This Pillow was built without the format.
            continue
    return found


def damaged_image(draw: random.Random) -> tuple[str, bytes]:
    """Return the name and the content of a damaged image, in rare cases of an intact one."""
    every = bases()
    name, data, change = draw.choice(every)
    others = [other for _, other, _ in every]
    chance = draw.random()
    if chance < 0.65:
        data = change(draw, data, others)
    if chance > 0.55 and chance < 0.97:
        data = damaged(draw, data, others)
    return name, data


def make(draw: random.Random) -> Case:
    name, data = damaged_image(draw)
    ending = name.rpartition(".")[2]
    settings = {
        "crop_scale": draw.choice(("null", "[0.2, 1.0]")),
        "range": draw.choice(("null", "null", "4095")),
        "epoch": str(draw.randrange(3)),
    }
    return Case(
        {f"images/1.{ending}": data} | {f"images/{each}": bases()[6][1] for each in _SOUND},
        [f"{key}={value}" for key, value in settings.items()],
    )


def use(folder: Path, case: Case) -> str:
    """Make a batch with each decoder, and check the samples as `mimae data check` does. All results have to agree."""
    given = dict(word.split("=") for word in case.words)
    settings = DataSettings.model_validate(
        {
            "image_size": 16,
            "max_pixels": MOST_PIXELS,
            "crop_scale": None if given["crop_scale"] == "null" else (0.2, 1.0),
            "range": None if given["range"] == "null" else int(given["range"]),
        }
    )
    source = open_source(str(folder / "images"), settings=settings)
    if len(source) != len(case.files):
        raise Wrong(f"{len(source)} samples from {len(case.files)} images")
    epoch = int(given["epoch"])
    batches = {"torch": batch_of(settings, source, epoch, EachDecoder())}
    scaled = batch_of(settings, source, epoch, EachDecoder(scaled=True))
    with libjpeg.unused():
        first = batch_of(settings, source, epoch, EachDecoder())
        if OBSTACLES["dali_cpu"](torch.device("cpu")) is None:
            batches["dali_cpu"] = batch_of(settings, source, epoch, RegionDecoder())
    reason = account(first, len(source))
    # DALI does not see damage outside its region, and decodes damaged data to other pixels (docs/data.md).
    if any(_has_damaged_pixels(source.read(i)) for i in range(len(source))):
        batches.pop("dali_cpu", None)
    for name, other in (*batches.items(), ("data.decode=scaled", scaled)):
        if [bad.id for bad in first.bad] != [bad.id for bad in other.bad]:
            raise Wrong(f"without mimae._C the loader replaces {first.bad}, {name} {other.bad}")
    for name, other in batches.items():
        if not torch.equal(first.images, other.images):
            apart = (first.images.int() - other.images.int()).abs()
            raise Wrong(
                f"{name}: {int((apart > 0).sum())} values differ from those of a whole decode, by up to {apart.max()}"
            )
    samples, broken = _look_at((source, settings), range(len(source)))
    if int(samples["ok"].sum()) + len(broken) != len(source) or {bad.id for bad in broken} != {
        bad.id for bad in first.bad
    }:
        raise Wrong(f"data check finds {broken}, the loader {first.bad}")
    return reason


def _has_damaged_pixels(data: bytes) -> bool:
    """Return True if an image is a plain JPEG that libjpeg-turbo decodes with a warning or not at all."""
    try:
        if look(data, MOST_PIXELS).orientation is None:
            return False
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except BadImage:
        return False
    except ValueError:
        return True
    return False


def batch_of(settings: DataSettings, source: Source, epoch: int, decoder: Decoder) -> Batch:
    """Return a batch of the first samples of a source."""
    return make_batch(settings, source, 0, BatchRequest(epoch, 0, np.arange(min(8, len(source)))), decoder)


def account(batch: Batch, samples: int) -> str:
    """Return the reason why a sample was replaced, or an empty string.

    Raises Wrong if a sample was replaced but is not named.
    """
    named = {bad.id for bad in batch.bad}
    own = batch.sample_ids % samples
    moved = own[own != batch.source_ids].tolist()
    if not set(moved) <= named or len(set(batch.sample_ids.tolist())) != len(batch.sample_ids):
        raise Wrong(f"samples {moved} were replaced, but {sorted(named)} are named")
    if any(not bad.reason or len(bad.reason) > 1000 for bad in batch.bad):
        raise Wrong(f"reasons {[bad.reason for bad in batch.bad]!r}"[:2000])
    return batch.bad[0].reason if batch.bad else ""


def _prepare() -> None:
    bases()
    if OBSTACLES["dali_cpu"](torch.device("cpu")) is None:
        import nvidia.dali.fn
        import nvidia.dali.types  # noqa: F401


IMAGES = Kind(make, use, _prepare, memory=400 << 20)
