"""From bytes to upright RGB pixels, for the kinds of files that real image collections contain, made with Pillow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimae.data.pixels.augment import Window
from mimae.data.pixels.decode import BadImage, brightest, count_scans, decode, look
from tests.data.conftest import encoded, photograph

HEIGHT, WIDTH = 48, 64
PIXELS = photograph(0, HEIGHT, WIDTH)
GREY = PIXELS[..., 1]
LIMIT = 1_000_000


def whole(height: int, width: int) -> Window:
    return Window(0, 0, height, width)


def pixels_of(data: bytes) -> np.ndarray:
    """Decode an image without a crop or resize, in PIXELS' own size, so that no error of a decoder is hidden."""
    return decode(data, whole, (HEIGHT, WIDTH), max_pixels=LIMIT)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    """Return alpha from 0 to 255 across the image: if alpha were applied, the left would be darker."""
    alpha = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, WIDTH))
    return np.dstack([pixels, alpha])


def palette(transparent: bool) -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(PIXELS).quantize(64)
    expected = np.asarray(image.convert("RGB"))
    return saved(image, "PNG", **({"transparency": bytes(range(64))} if transparent else {})), expected


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def lossless() -> dict[str, tuple[bytes, np.ndarray]]:
    grey16 = GREY.astype(np.uint16) * 257
    frames = [Image.fromarray(photograph(i, HEIGHT, WIDTH)).quantize(64) for i in range(3)]
    bilevel = np.where(GREY > 127, 255, 0).astype(np.uint8)
    return {
        "png": (encoded(PIXELS), PIXELS),
        "bmp": (encoded(PIXELS, "BMP"), PIXELS),
        "webp": (encoded(PIXELS, "WEBP", lossless=True), PIXELS),
        "tiff lzw": (encoded(PIXELS, "TIFF", compression="tiff_lzw"), PIXELS),
        "tiff planar": (tiff(PIXELS.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), PIXELS),
        "grey": (encoded(GREY), three(GREY)),
        "grey 16 bits": (encoded(grey16), three(GREY)),
        "grey 16 bits, big-endian tiff": (tiff(grey16, byteorder=">"), three(GREY)),
        "rgb 16 bits": (png_of_16_bits(), PIXELS),
        "1 bit": (saved(Image.fromarray(bilevel).convert("1"), "PNG"), three(bilevel)),
        "palette": palette(transparent=False),
        "palette with transparency": palette(transparent=True),
        "grey with alpha": (encoded(with_alpha(GREY)), three(GREY)),
        "rgba": (encoded(with_alpha(PIXELS)), PIXELS),
        "animated gif": (
            saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            np.asarray(frames[0].convert("RGB")),
        ),
    }


def png_of_16_bits() -> bytes:
    """Return a 16-bit RGB PNG, which Pillow can read but not write."""
    rows = b"".join(b"\0" + row.tobytes() for row in (PIXELS.astype(int) * 257).astype(">u2"))
    return png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0), zlib.compress(rows))


def png(header: bytes, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


LOSSLESS = lossless()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels_that_were_written(kind: str) -> None:
    data, expected = LOSSLESS[kind]
    np.testing.assert_array_equal(pixels_of(data), expected)


def test_grey_of_16_bits_is_scaled_and_rounded() -> None:
    """Values v become v / 257, rounded to the nearest: neither clipped at 255 nor truncated to the high byte."""
    values = np.arange(0, 65536, 21)[: HEIGHT * WIDTH].reshape(HEIGHT, WIDTH).astype(np.uint16)
    np.testing.assert_array_equal(pixels_of(encoded(values))[..., 0], np.rint(values / 257).astype(np.uint8))


def smooth() -> np.ndarray:
    """The pixels have no noise, because JPEG does not keep it."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([3 * x, 5 * y, 255 - 2 * x - y], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, smooth()),
        ({"progressive": True}, smooth()),
        ({"subsampling": 0, "restart_marker_blocks": 3}, smooth()),
    ],
    ids=["baseline", "progressive", "4:4:4 with restarts"],
)
def test_jpeg(options: dict[str, object], expected: np.ndarray) -> None:
    found = pixels_of(encoded(expected, "JPEG", quality=98, **options)).astype(int)
    assert np.abs(found - expected).mean() < 2


def test_jpeg_of_one_channel_and_of_four() -> None:
    grey = smooth()[..., 0]
    assert np.abs(pixels_of(encoded(grey, "JPEG", quality=98)).astype(int) - three(grey)).mean() < 2
    cmyk = saved(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert np.abs(pixels_of(cmyk).astype(int) - smooth()).mean() < 2


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""The stored rows for each EXIF orientation, such that turning them gives the upright image."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])  # Pillow itself turns TIFF, but no other format.
def test_exif_orientation(format: str, orientation: int) -> None:
    exif = turned_by(orientation)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(np.ascontiguousarray(TURNED[orientation](PIXELS)), format, exif=exif, **options)
    sizes = []

    def window(height: int, width: int) -> Window:
        sizes.append((height, width))
        return Window(8, 16, 24, 32)

    np.testing.assert_array_equal(decode(data, window, (24, 32), max_pixels=LIMIT), PIXELS[8:32, 16:48])
    assert sizes == [(HEIGHT, WIDTH)]


@pytest.mark.parametrize("body", [b"", b"II*\0garbage", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40])
def test_corrupt_exif_says_nothing_about_the_pixels(body: bytes) -> None:
    good = encoded(PIXELS, "JPEG", quality=95)
    block = b"Exif\0\0" + body
    data = good[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + good[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels_of(data), pixels_of(good))


def test_bytes_after_the_image_do_no_harm() -> None:
    good = encoded(PIXELS, "JPEG")
    np.testing.assert_array_equal(pixels_of(good + bytes(5000)), pixels_of(good))


def bad_header(kind: bytes, width: int, height: int) -> bytes:
    """Return a 1-bit PNG that claims a size but has almost no pixel data."""
    return png(struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), zlib.compress(kind))


JPEG = encoded(PIXELS, "JPEG")
PNG = encoded(PIXELS)
TWELVE_BITS = b"\xff\xd8\xff\xdb\0\x43\0" + bytes([8] * 64) + b"\xff\xc1\0\x0b\x0c" + bytes([0, 64, 0, 96, 1, 1, 17, 0])
"""Return the header of a grey JPEG of 12 bits per channel: a table, and a frame of precision 12."""

REFUSED = {
    "12 bits": (TWELVE_BITS, "12 bits per channel"),
    # Pillow would run Ghostscript on it.
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "begins with"),
    "empty": (b"", "empty"),
    "text": (b"This is not an image.\n", "begins with b'This is not an i'"),
    "an error page": (b"<!DOCTYPE html><title>404</title>", "begins with b'<!DOCTYPE html"),
    "truncated jpeg": (JPEG[: len(JPEG) * 6 // 10], "truncated"),
    "truncated png": (PNG[: len(PNG) * 6 // 10], "truncated"),
    "header alone": (JPEG[:20], "begins with|truncated"),
    "no width": (bad_header(b"", 0, 8), "begins with|size"),
    "past the limit": (bad_header(b"", 1000, 1001), r"1000 x 1001 is 1001000 pixels.*max_pixels = 1000000"),
    "past Pillow's limit": (bad_header(b"", 30000, 30000), r"900000000 pixels\), more than data.max_pixels = "),
    "2 channels, no alpha": (
        tiff(np.dstack([GREY, GREY]), photometric="minisblack", planarconfig="contig"),
        "2 channels",
    ),
    "5 channels": (tiff(np.dstack([PIXELS, GREY, GREY]), photometric="rgb"), "5 channels.*1, 3 or 4"),
    "12 bands": (
        tiff(np.dstack([GREY] * 12), photometric="minisblack", planarconfig="contig"),
        "12 channels.*1, 3 or 4",
    ),
    "float": (tiff(GREY / np.float32(255)), "32-bit pixels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_in_one_line(kind: str) -> None:
    data, reason = REFUSED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warning about a large image would name no file.
        with pytest.raises(BadImage, match=reason) as refusal:
            pixels_of(data)
    assert len(str(refusal.value).splitlines()) == 1
    assert "0x" not in str(refusal.value)  # The reason contains no object address, so it is the same in every process.


def test_limit_is_inclusive() -> None:
    decode(PNG, whole, (4, 4), max_pixels=HEIGHT * WIDTH)
    with pytest.raises(BadImage, match="max_pixels"):
        decode(PNG, whole, (4, 4), max_pixels=HEIGHT * WIDTH - 1)


@settings(max_examples=200)
@given(
    st.sampled_from([JPEG, PNG, LOSSLESS["webp"][0], LOSSLESS["tiff lzw"][0], LOSSLESS["animated gif"][0]]), st.data()
)
def test_damage_gives_pixels_or_a_reason(good: bytes, data: st.DataObject) -> None:
    """For any bytes, decode either returns an image of the requested size or raises BadImage."""
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for place in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=8 if damaged else 0)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(damaged), whole, (8, 8), max_pixels=LIMIT)
    except BadImage as refusal:
        assert "\n" not in str(refusal)
    else:
        assert found.shape == (8, 8, 3) and found.dtype == np.uint8


@pytest.mark.parametrize(
    ("window", "size"),
    [
        (Window(3, 5, 200, 150), (64, 64)),  # Down, and out of proportion.
        (Window(0, 0, 30, 40), (96, 80)),  # Up, and not square.
        (Window(10, 20, 64, 48), (64, 48)),  # Unchanged.
        (Window(0, 0, 240, 1), (32, 32)),  # A column.
    ],
)
def test_resize_is_antialiased_bicubic_of_the_window_alone(window: Window, size: tuple[int, int]) -> None:
    """The resize is compared with Pillow's, another implementation, which rounds between the two passes.

    Bilinear would differ by 0.4 on average. In enlargements, pixels from outside of the window would change its edges
    by 8.
    """
    image = photograph(3, 240, 320)
    found = decode(encoded(image), lambda height, width: window, size, max_pixels=LIMIT)
    top, left, height, width = window
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    difference = np.abs(found.astype(int) - np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)))
    assert difference.max() <= 2 and difference.mean() < 0.05


PLAIN = {
    "baseline": (encoded(PIXELS, "JPEG"), 1),
    "progressive": (encoded(PIXELS, "JPEG", progressive=True), 1),
    "grey": (encoded(GREY, "JPEG"), 1),
    "on its side": (encoded(PIXELS, "JPEG", exif=turned_by(6)), 6),
    "an orientation that there is not": (encoded(PIXELS, "JPEG", exif=turned_by(9)), 1),
    "a few bytes after it": (encoded(PIXELS, "JPEG") + bytes(60), 1),
    "stored as red, green and blue": (saved(Image.fromarray(PIXELS), "JPEG", keep_rgb=True), None),
    "four channels": (saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), None),
    "cut off": (JPEG[:-100], None),
    "many bytes after it": (JPEG + bytes(100), None),
    "png": (PNG, None),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_which_images_are_plain_jpegs(kind: str) -> None:
    """Plain JPEGs are those that every decoder decodes alike; they have an orientation.

    All other files are not given to decoders that might accept other files than Pillow or decode them differently.
    """
    data, orientation = PLAIN[kind]
    assert look(data, LIMIT).orientation == orientation


# Small files that would take long or much


def with_scans(jpeg: bytes, scans: int) -> bytes:
    """Repeat the last scan of a progressive JPEG, with its tables."""
    last = jpeg.rindex(b"\xff\xda")
    table = jpeg.rindex(b"\xff\xc4", 0, last)
    return jpeg[:-2] + jpeg[table:-2] * scans + b"\xff\xd9"


PROGRESSIVE = encoded(PIXELS, "JPEG", progressive=True)


def test_scans_are_bounded() -> None:
    """libjpeg writes ten scans. Each scan decodes the whole image, even if it has little data."""
    assert count_scans(PROGRESSIVE, 1000) == 10
    pixels_of(with_scans(PROGRESSIVE, 90))
    with pytest.raises(BadImage, match="at least 101 scans of 3072 pixels each; a JPEG of its size may have 100"):
        pixels_of(with_scans(PROGRESSIVE, 91))
    with pytest.raises(BadImage, match="may have 20"):
        decode(with_scans(PROGRESSIVE, 11), whole, (8, 8), max_pixels=HEIGHT * WIDTH)
    decode(with_scans(PROGRESSIVE, 10), whole, (8, 8), max_pixels=HEIGHT * WIDTH)


def test_what_looks_like_scans_is_none() -> None:
    """A phone may store a video after the image, and a thumbnail in its segments; both may contain any bytes."""
    jpeg = encoded(PIXELS, "JPEG", comment=b"\xff\xda" * 400)
    for data in (jpeg, encoded(PIXELS, "JPEG") + b"\xff\xda" * 400):
        assert count_scans(data, 1000) == 1
        pixels_of(data)


@given(st.binary(max_size=300), st.integers(0, 600))
def test_scans_of_any_bytes_are_counted(tail: bytes, cut: int) -> None:
    assert 0 <= count_scans(PROGRESSIVE[:cut] + tail, 50) <= 50


def test_tiles_are_bounded() -> None:
    """libtiff allocates a whole tile, even if the image has only 16 pixels of it."""
    data = tiff(GREY, tile=(32, 16))
    pixels_of(data)
    at = data.index(struct.pack("<HH", 322, 4)) if struct.pack("<HH", 322, 4) in data else data.index(b"\x42\x01")
    entry = bytearray(data[at : at + 24])
    entry[0:12] = struct.pack("<HHII", 322, 4, 1, 40_000)
    entry[12:24] = struct.pack("<HHII", 323, 4, 1, 40_000)
    with pytest.raises(BadImage, match=r"tiles are of 40000 x 40000 pixels, more than data\.max_pixels"):
        pixels_of(data[:at] + bytes(entry) + data[at + 24 :])


# 12 bits in 16


def png_of(values: np.ndarray) -> bytes:
    """Encode pixels uint16 (H, W) or (H, W, C) as a PNG of 16 bits per channel."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0), zlib.compress(rows))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_range_of_16_bits_is_a_setting(channels: int) -> None:
    """12-bit values become black. With `data.range` they use all of 0 to 255, and not only 16 steps of it."""
    values = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH, 4)).astype(np.uint16)[..., :channels]
    data = png_of(values[..., 0] if channels == 1 else values)
    assert decode(data, whole, (HEIGHT, WIDTH), max_pixels=LIMIT).max() <= 16
    found = decode(data, whole, (HEIGHT, WIDTH), max_pixels=LIMIT, white=4095)
    expected = np.round(values[..., :3] * (255 / 4095))
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))
    brighter = decode(data, whole, (HEIGHT, WIDTH), max_pixels=LIMIT, white=100)
    assert brighter.max() == 255, "what is above the range is white"


def test_the_range_does_not_touch_8_bits() -> None:
    np.testing.assert_array_equal(decode(PNG, whole, (HEIGHT, WIDTH), max_pixels=LIMIT, white=100), pixels_of(PNG))


@pytest.mark.parametrize(
    ("data", "brightest_value"),
    [
        (encoded(np.full((4, 4), 4095, np.uint16)), 4095),
        (encoded(PIXELS), None),
        (png_of(np.full((4, 4, 3), 4095, np.uint16)), 0x0FFF),
        (tiff(np.full((4, 4, 3), 4095, np.uint16), photometric="rgb"), 0x0FFF),
    ],
)
def test_the_brightest_value_of_16_bits(data: bytes, brightest_value: int | None) -> None:
    assert brightest(look(data, LIMIT)) == brightest_value
