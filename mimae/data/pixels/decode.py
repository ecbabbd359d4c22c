"""From the bytes of an image file to the pixels of a sample. Any bytes give either pixels or BadImage."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from mimae.data.pixels import jpeg
from mimae.data.pixels.augment import Window
from mimae.data.pixels.cut import Turn, finish
from mimae.outside.text import printable

MOST_SCANS = 100
"""Largest number of scans of a JPEG, the limit of libtiff; libjpeg writes ten."""

MOST_SCANNED = 20
"""Largest number of scans of a JPEG of `max_pixels`. Smaller ones may have more: each scan decodes the whole image."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF")
_CHANNELS_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 277, 322, 323
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
"""A JPEG marker, as opposed to entropy-coded bytes."""
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCAN = b"\xff\xda"
_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")


class BadImage(Exception):
    """The bytes are not a usable image. The message is one line that says why."""


@dataclass
class Encoded:
    """An image with a valid header whose pixels are not decoded yet."""

    data: bytes
    height: int
    width: int
    """In stored pixels."""
    orientation: int | None
    """EXIF orientation (1 to 8) of a plain JPEG, which all decoders decode alike. None: every loader uses Pillow."""
    max_pixels: int
    white: int | None = None
    """The 16-bit value that is mapped to 255; None: 65535."""

    @cached_property
    def image(self) -> Image.Image:
        """The image as Pillow opens it."""
        return _open(self.data, self.max_pixels)


def look(data: bytes, max_pixels: int, white: int | None = None) -> Encoded:
    """Read and check the header: at most `max_pixels` pixels, and 1, 3 or 4 channels (or grey with alpha).

    A JPEG is plain if it has 8 bits per channel, is grey or YCbCr, and is not truncated. Raises BadImage.
    """
    if (found := jpeg.header(data)) and found.height * found.width <= max_pixels:
        return Encoded(data, *found, max_pixels, white)
    with _bad_image():
        image = _open(data, max_pixels)
        encoded = Encoded(data, image.height, image.width, None, max_pixels, white)
        encoded.image = image
        if _is_plain_jpeg(image, data):
            encoded.orientation = _orientation(image)
        return encoded


def region(encoded: Encoded, window: Callable[[int, int], Window]) -> np.ndarray:
    """Return `window(height, width)` of the upright image, decoded by Pillow: uint8 RGB (h, w, 3), not resized.

    Alpha is dropped, 16-bit values are scaled, and only the first frame of an animation is used. Raises BadImage.
    """
    with _bad_image():
        image = _upright(_loaded(encoded.image, encoded.data, encoded.white), _orientation(encoded.image))
        top, left, height, width = window(image.height, image.width)
        return np.array(_rgb(image.crop((left, top, left + width, top + height)), encoded.white))


def decode(
    data: bytes,
    window: Callable[[int, int], Window],
    size: tuple[int, int],
    *,
    max_pixels: int,
    white: int | None = None,
) -> np.ndarray:
    """Return `window` of the upright image, resized to `size` (height, width): uint8 RGB (*size, 3). Raises BadImage.

    The image is checked as by `look`. The resize uses only pixels inside the window.
    """
    return finish(torch.from_numpy(region(look(data, max_pixels, white), window)), size, Turn()).numpy()


def whole(data: bytes, max_pixels: int, white: int | None = None) -> Image.Image:
    """Return the whole image, upright and RGB, checked as by `look`. Raises BadImage."""
    with _bad_image():
        image = _open(data, max_pixels)
        return _rgb(_upright(_loaded(image, data, white), _orientation(image)), white)


def brightest(encoded: Encoded) -> int | None:
    """Return the largest value in an image of 16 bits per channel, or None for images of fewer bits. Raises BadImage.

    Pillow keeps only the upper 8 bits of a 16-bit colour image. The lower 8 bits are assumed to be ones.
    """
    with _bad_image():
        image = encoded.image
        if is_deep_colour(image):
            return int(np.asarray(image).max()) << 8 | 0xFF
        return int(np.asarray(image).max()) if image.mode in _GREY_16 else None


def is_deep_colour(image: Image.Image) -> bool:
    """Return whether an image, not yet decoded, has colour or alpha with 16 bits per channel."""
    return image.mode not in _GREY_16 and any(";16" in repr(tile[3]) for tile in getattr(image, "tile", ()))


def _loaded(image: Image.Image, data: bytes, white: int | None) -> Image.Image:
    """Return an opened image with its pixels decoded. With `white`, a colour PNG is scaled from its full 16 bits."""
    if white is not None and image.format == "PNG" and is_deep_colour(image):
        # Here, since the import takes seconds and few data sets need it.
        from torchvision.io import ImageReadMode, decode_png  # type: ignore[import-untyped]

        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        values = pixels.permute(1, 2, 0).numpy()
        colours = values[..., :3] if len(pixels) > 2 else np.repeat(values[..., :1], 3, 2)
        return Image.fromarray(_scaled(colours, white))
    image.load()
    return image


def format_of(data: bytes, max_pixels: int) -> str:
    """Return the name of the format. Only the header is read; it is checked as by `look`. Raises BadImage."""
    with _bad_image():
        return str(_open(data, max_pixels).format)


def why(error: BadImage | OSError) -> str:
    """Return one line that says why a sample cannot be used: its bytes are not an image, or they could not be read."""
    return printable(str(error) if isinstance(error, BadImage) else f"the file cannot be read: {_reason(error)}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def _bad_image() -> Iterator[None]:
    """Convert any exception to BadImage.

    On damaged files decoders raise OSError, SyntaxError, struct.error, MemoryError and almost anything else.
    """
    try:
        # Pillow's warnings do not name the image. The caller reports unusable images by name.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Return the image with its header read and checked and its pixels not yet decoded."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*"):
            _check_channels(_tiff_channels(data), "TIFF")
        hint = "; as a JPEG it is damaged, or has 12 bits per channel" if data.startswith(b"\xff\xd8") else ""
        raise BadImage(f"no header of an image that Pillow reads (the file begins with {data[:16]!r}{hint})") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, which max_pixels cannot exceed
        raise BadImage(f"{str(error).partition(' exceeds')[0]}, more than data.max_pixels = {max_pixels}") from None
    if image.width * image.height > max_pixels:
        raise BadImage(
            f"{image.width} x {image.height} is {image.width * image.height} pixels, "
            f"more than data.max_pixels = {max_pixels}"
        )
    channels = len(image.getbands())
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow presents some TIFFs of five or six channels as RGB or CMYK.
        channels = image.tag_v2.get(_CHANNELS_TAG, channels)
        # libtiff allocates memory for a whole tile, even if the image is small.
        tile = image.tag_v2.get(_TILE_WIDTH_TAG, 0), image.tag_v2.get(_TILE_HEIGHT_TAG, 0)
        if tile[0] * tile[1] > max_pixels:
            raise BadImage(f"its tiles are of {tile[0]} x {tile[1]} pixels, more than data.max_pixels = {max_pixels}")
    _check_channels(channels, image.mode)
    if image.format in ("JPEG", "MPO"):
        pixels = max(1, image.width * image.height)
        most = min(MOST_SCANS, MOST_SCANNED * max_pixels // pixels)
        # Bytes that look like a scan marker may be part of a thumbnail, or of a video stored after the image.
        if data.count(_SCAN) > most and (scans := count_scans(data, most + 1)) > most:
            raise BadImage(f"at least {scans} scans of {pixels} pixels each; a JPEG of its size may have {most}")
    return image


def count_scans(data: bytes, most: int) -> int:
    """Return the number of scans of a JPEG, counted up to `most`."""
    at, scans = 2, 0
    while scans < most and (marker := _MARKER.search(data, at)):
        kind, at = data[marker.end() - 1], marker.end()
        if kind == 0xD9:  # The end of the image.
            break
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):  # All other segments have a length and are skipped.
            at += int.from_bytes(data[at : at + 2], "big")
    return scans


@lru_cache(1)
def _formats() -> tuple[str, ...]:
    """Return the supported formats that this Pillow reads. Others, such as EPS, would make it start programs."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_channels(channels: int, mode: str) -> None:
    if channels not in (1, 3, 4) and not (channels == 2 and mode in ("LA", "La", "PA")):
        raise BadImage(f"{channels} channels; images have 1, 3 or 4 (or grey with alpha)")


def _tiff_channels(data: bytes) -> int:
    """The channel count in the header of a TIFF that Pillow refuses to open."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return directory.get(_CHANNELS_TAG, 1)


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Pillow opens no other JPEGs than those of 8 bits; one that misses its end is truncated or has bytes after it."""
    stored_as_rgb = image.info.get("adobe_transform") == 0
    return image.format == "JPEG" and image.mode in ("L", "RGB") and not stored_as_rgb and b"\xff\xd9" in data[-64:]


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # A corrupt EXIF block says nothing about the pixels.
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """The loaded image turned as its EXIF orientation asks."""
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _scaled(values: np.ndarray, white: int) -> np.ndarray:
    """Scale 16-bit values to uint8, with `white` and all larger values becoming 255."""
    return np.minimum((values.astype(np.uint32) * 255 + white // 2) // white, 255).astype(np.uint8)


def _rgb(image: Image.Image, white: int | None) -> Image.Image:
    if image.mode in _GREY_16:
        # Pillow's own conversion clips at 255.
        return Image.fromarray(_scaled(np.asarray(image), white or 65535)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit pixels (mode {image.mode}) have no known range; convert to 8 or 16 bits")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGB")
