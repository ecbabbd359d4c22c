"""Regions of JPEGs in mimae._C: the pixels, the windows and the verdicts of a whole decode."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from mimae.bench.harness.fuzz.images import bases
from mimae.data.loading.samples import Clock, EachDecoder, Sample, region_of
from mimae.data.pixels import jpeg
from mimae.data.pixels.augment import Window
from mimae.data.pixels.cut import finish
from mimae.data.pixels.decode import BadImage, look
from mimae.data.tools.pack import transcoded
from tests.data.conftest import encoded, photograph
from tests.data.pixels.test_decode import TURNED, turned_by

pytestmark = pytest.mark.skipif(jpeg.obstacle() is not None, reason=str(jpeg.obstacle()))

LIMIT = 50_000_000


def windows(height: int, width: int, count: int, seed: int) -> list[Window]:
    """Return random windows, after those at the corners, the whole and single pixels."""
    draw = random.Random(seed)
    found = [
        Window(0, 0, height, width),
        Window(0, 0, 1, 1),
        Window(height - 1, width - 1, 1, 1),
        Window(height // 2, width // 2, height - height // 2, width - width // 2),
    ]
    for _ in range(count):
        h, w = draw.randint(1, height), draw.randint(1, width)
        found.append(Window(draw.randint(0, height - h), draw.randint(0, width - w), h, w))
    return found


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "grey"])
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (97, 131),  # no multiples of a block
        (160, 256),  # 16 MCUs: segments of 8
        (11, 300),  # lower than an MCU
        (300, 7),  # narrower than one
        (1, 1),
    ],
)
def test_regions_are_crops_of_the_whole(height: int, width: int, subsampling: str) -> None:
    """Without and with restart markers in rows, in odd places, and as packing writes them."""
    pixels = photograph(3, height, width)
    if subsampling == "grey":
        write = partial(encoded, pixels[..., 0], "JPEG")
    else:
        write = partial(encoded, pixels, "JPEG", subsampling=subsampling)
    if subsampling == "4:4:0":  # which Pillow does not write
        plain = [simplejpeg.encode_jpeg(pixels, colorsubsampling="440")]
    else:
        plain = [write(), write(restart_marker_blocks=3), write(restart_marker_rows=1)]
    progressive = [] if subsampling == "4:4:0" else [write(progressive=True)]
    for data in [*plain, *map(jpeg.transcoded, [*plain, *progressive])]:
        assert data is not None
        whole = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        assert jpeg.header(data) == (height, width, 1)
        for window in windows(height, width, 12, height):
            top, left, h, w = window
            found = jpeg.region(data, window)
            assert found is not None and np.array_equal(found.numpy(), whole[top : top + h, left : left + w]), window


def test_windows_outside_of_the_image_are_refused() -> None:
    data = encoded(photograph(0, 20, 30), "JPEG")
    for window in ((0, 0, 21, 1), (-1, 0, 5, 5), (0, 26, 5, 5), (0, 0, 1, 31), (2**31 - 1, 0, 1, 1)):
        assert jpeg.region(data, Window(*window)) is None


def test_orientation_is_pillows() -> None:
    for orientation in TURNED:
        data = encoded(photograph(0, 20, 30), "JPEG", exif=turned_by(orientation))
        assert jpeg.header(data) == (20, 30, orientation)


def test_headers_that_pillow_reads_in_its_own_way_are_left_to_it() -> None:
    """A size from a header that Pillow refuses would make a sample of an image that is replaced elsewhere."""
    pixels = photograph(0, 20, 30)
    data = encoded(pixels, "JPEG")
    at = data.index(b"\xff\xdb")

    def with_segment(marker: int, content: bytes) -> bytes:
        return data[:at] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + data[at:]

    exif = b"Exif\0\0MM\0*\0\0\0\x08"
    cases = {
        "an orientation in XMP": with_segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0 tiff:Orientation="6"'),
        "several images": with_segment(0xE2, b"MPF\0"),
        "RGB": with_segment(0xEE, b"Adobe\0d\0\0\0\0\0"),
        "Photoshop, cut off": with_segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
        "a profile without its number": with_segment(0xE2, b"ICC_PROFILE\0"),
        "EXIF, cut off": with_segment(0xE1, exif + b"\0\x05"),
        "a resolution of another type": with_segment(0xE1, exif + b"\0\1\1\x1a\0\7\0\0\0\1\1\0\0\0\0\0\0\0"),
        "an orientation of four bytes": with_segment(0xE1, exif + b"\0\1\1\x12\0\4\0\0\0\1\0\0\0\6\0\0\0\0"),
        "an orientation after a value that lies outside": with_segment(
            *(0xE1, exif + b"\0\2\1\x0f\0\2\0\0\0\x14\0\0\x0f\xa0\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
        ),
        "quantization tables, cut off": with_segment(0xDB, bytes(64)),
        "quantization tables of 16 bits, cut off": with_segment(0xDB, b"\x10" + bytes(127)),
        "progressive": encoded(pixels, "JPEG", progressive=True),
        "bytes behind the end": data + bytes(70),
        "no end": data[:-2],
        "CMYK": next(data for name, data, _ in bases() if name == "cmyk.jpg"),
        "nothing": b"",
    }
    for name, case in cases.items():
        assert jpeg.header(case) is None, name
    xmp = b'http://ns.adobe.com/xap/1.0/\0 tiff:Orientation="6"'
    data = encoded(pixels, "JPEG", exif=turned_by(3))
    at = data.index(b"\xff\xdb")
    assert jpeg.header(with_segment(0xE1, xmp)) == (20, 30, 3), "EXIF is stronger than XMP"
    data = encoded(pixels, "JPEG")
    at = data.index(b"\xff\xdb")
    assert jpeg.header(with_segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\0")) == (20, 30, 1)


def test_exif_is_read_as_pillow_reads_it_or_left_to_it() -> None:
    """Blocks with damage: values that lie outside, other types and counts, tags twice, both orders of bytes."""
    draw = random.Random(7)
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112], exif[0x011A], exif[0x0128] = "maker", "a model", 6, 300.0, 2
    exif[0x0132] = "2026:01:01 00:00:00"
    big, little = bytes(exif.tobytes()), Image.Exif()
    little.load(big)
    little.endian = "<"
    blocks = [big, little.tobytes()]
    plain = encoded(photograph(0, 20, 30), "JPEG")
    at = plain.index(b"\xff\xdb")
    seen = {"turned": 0, "upright": 0, "left": 0}
    for number in range(4000):
        block = bytearray(blocks[number % 2])
        for _ in range(draw.randint(1, 2)):
            place = draw.randrange(6, min(len(block), 100))
            block[place] = draw.choice((0, 1, 2, 3, 4, 5, 8, 12, 13, 0x7F, 0xFF, draw.randrange(256)))
        data = plain[:at] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + plain[at:]
        found = jpeg.header(data)
        seen["left" if found is None else "upright" if found.orientation == 1 else "turned"] += 1
        if found is not None:
            with jpeg.unused():
                assert look(data, LIMIT).orientation == found.orientation, (number, bytes(block))
    assert min(seen.values()) > 100, seen


def verdict(data: bytes, window: Window) -> np.ndarray | str:
    """Return a sample, or that it is bad."""
    try:
        pixels, turn = region_of(Sample(0, look(data, LIMIT), lambda height, width: window, True))
    except BadImage:
        return "bad"
    return finish(pixels, (40, 40), turn).numpy()


def test_damaged_files_have_the_pixels_and_the_verdicts_of_a_whole_decode() -> None:
    """Wherever the damage lies: above, in or below the region, in the header, in the order of restart markers."""
    draw = random.Random(5)
    pixels = photograph(3, 60, 90)
    plain, turned = (encoded(pixels, "JPEG", quality=80, **more) for more in ({}, {"exif": turned_by(6)}))
    files = [plain, jpeg.transcoded(plain), turned, encoded(pixels, "JPEG", restart_marker_blocks=2)]
    seen = {"bad": 0, "by region": 0, "whole": 0}
    for number in range(400):
        file = files[number % len(files)]
        assert file is not None
        data = bytearray(file)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data) if draw.random() < 0.7 else 700)
            kind = draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                data[at : at + 2] = bytes([0xFF, draw.choice((0, 0xD0, 0xD3, 0xD9, 0xC4, 0xE1))])
            elif kind == 2:
                del data[at : at + draw.randrange(9)]
            else:
                data[at:at] = bytes(data[at : at + draw.randrange(9)])
        window = windows(60, 60, 1, number)[-1]
        ours = verdict(bytes(data), window)
        by_region = jpeg.region(bytes(data), window) is not None
        with jpeg.unused():
            whole = verdict(bytes(data), window)
        assert isinstance(ours, str) == isinstance(whole, str), number
        assert np.array_equal(ours, whole), number
        seen["bad" if isinstance(ours, str) else "by region" if by_region else "whole"] += 1
    assert min(seen.values()) > 20, seen


def photographs() -> dict[str, bytes]:
    """Return the JPEGs of scikit-image and of the fuzzer."""
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    files = Path(spec.submodule_search_locations[0], "data").glob("*.jp*g")
    return {file.name: file.read_bytes() for file in files} | {name: data for name, data, _ in bases()}


def test_transcoding_keeps_every_pixel_and_the_metadata() -> None:
    """This holds for all images of the packages; those of other kinds keep their bytes."""
    changed = set()
    for name, data in photographs().items():
        made = transcoded(data, LIMIT)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), np.asarray(Image.open(io.BytesIO(data)))), name
        if made == data:
            continue
        changed.add(name)
        before, after = (Image.open(io.BytesIO(each)) for each in (data, made))
        assert (after.size, after.mode) == (before.size, before.mode)
        for key in ("exif", "icc_profile", "comment", "jfif_density", "adobe_transform"):
            assert after.info.get(key) == before.info.get(key), (name, key)
        assert jpeg.header(made) is not None and "progressive" not in after.info
    assert {"baseline.jpg", "progressive.jpg", "turned.jpg", "grey.jpg", "rocket.jpg"} <= changed
    assert not changed & {"cmyk.jpg", "several.mpo", "colour.png"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-300], lambda data: data[:900] + data[-2:]], ids=["truncated", "without its middle"]
)
def test_what_is_damaged_is_not_transcoded(damage: Callable[[bytes], bytes]) -> None:
    data = damage(encoded(photograph(0, 60, 90), "JPEG"))
    assert transcoded(data, LIMIT) == data


def test_files_with_more_than_transcoding_keeps_are_not_transcoded() -> None:
    plain = encoded(photograph(0, 60, 90), "JPEG", progressive=True)
    jfif, rest = plain[:20], plain[20:]
    assert jfif[2:4] == b"\xff\xe0" and jfif[6:10] == b"JFIF"
    thumbnail = jfif[:2] + b"\xff\xe0\0\x40" + jfif[6:18] + b"\4\4" + bytes(range(48))

    def adobe(content: bytes) -> bytes:
        return plain[:2] + b"\xff\xee" + (len(content) + 7).to_bytes(2, "big") + b"Adobe" + content + rest

    kept = {
        "another image behind the end": plain + encoded(photograph(1, 20, 30), "JPEG"),
        "bytes behind the end": plain + b"T" * 60,
        "a byte behind the end": plain + b"\0",
        "a thumbnail": thumbnail + rest,
        "two headers of JFIF": jfif + jfif[2:] + rest,
        "flags of Adobe": adobe(b"\0\x65\xc0\0\x40\0\1"),
        "Adobe, cut off": adobe(b"\0\x64"),
        "Adobe, longer": adobe(b"\0\x64\0\0\0\0\1more"),
    }
    for name, data in kept.items():
        assert np.asarray(Image.open(io.BytesIO(data))).shape == (60, 90, 3)
        assert transcoded(data, LIMIT) == data, name
    for data in (plain, adobe(b"\0\x64\0\0\0\0\1"), jfif + b"\xff\xfe\0\5abc" + rest):
        assert transcoded(data, LIMIT) != data


def test_without_the_extension_all_is_as_before() -> None:
    data = encoded(photograph(0, 60, 90), "JPEG", exif=turned_by(6))
    sample = partial(Sample, 0, window=lambda height, width: Window(3, 4, 30, 20), flip=True)
    ours, turn = region_of(sample(encoded=look(data, LIMIT)))
    with jpeg.unused():
        assert jpeg.obstacle() is not None and jpeg.header(data) is None and jpeg.transcoded(data) is None
        whole, same_turn = region_of(sample(encoded=look(data, LIMIT)))
    assert torch.equal(ours, whole) and turn == same_turn


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_scaled_regions_are_crops_of_the_scaled_whole(subsampling: str, scale: int) -> None:
    """Sides are no multiples of the scale. Markers between columns let the region's segments alone be decoded."""
    height, width = 241, 517
    pixels = photograph(3, height, width)
    plain = encoded(pixels, "JPEG", subsampling=subsampling)
    for data in (plain, jpeg.transcoded(plain)):
        assert data is not None
        rows, columns = -(-height // scale), -(-width // scale)
        whole = jpeg.region(data, Window(0, 0, rows, columns), scale)
        assert whole is not None
        # simplejpeg takes the smallest size that libjpeg offers from these sides on.
        oracle = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns, strict=True)
        assert np.array_equal(whole.numpy(), oracle)
        for window in windows(rows, columns, 12, scale):
            found = jpeg.region(data, window, scale)
            top, left, h, w = window
            assert found is not None and torch.equal(found, whole[top : top + h, left : left + w])
        assert jpeg.region(data, Window(0, 0, rows + 1, columns), scale) is None
        assert jpeg.region(data, Window(0, 0, rows, columns), 3) is None


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_scaled_sample_resembles_the_exact_one(orientation: int) -> None:
    """A crop of 4 x 5 times a sample's sides is decoded at half of its size; a smaller crop is decoded exactly.

    The corners are multiples of 2. Other corners would move by one pixel of the file, so a scaled sample has to differ
    less from the exact one than the samples of all windows that lie one pixel away.
    """
    data = encoded(photograph(1, 400, 600), "JPEG", quality=90, exif=turned_by(orientation))

    def sample(window: Window, scaled: bool) -> torch.Tensor:
        image = torch.zeros(1, 56, 66, 3, dtype=torch.uint8)
        each = Sample(0, look(data, LIMIT), lambda height, width: window, True)
        assert EachDecoder(scaled=scaled)([each], image, Clock()) == []
        return image.double()

    large, small = Window(4, 6, 224, 330), Window(3, 5, 190, 255)
    exact = sample(large, False)
    neighbours = [large._replace(top=3), large._replace(top=5), large._replace(left=5), large._replace(left=7)]
    moved = [(sample(window, False) - exact).square().mean() for window in neighbours]
    assert 0 < (sample(large, True) - exact).square().mean() < min(moved)
    assert torch.equal(sample(small, True), sample(small, False))
