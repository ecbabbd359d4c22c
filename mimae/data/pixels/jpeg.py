"""Baseline JPEGs by libjpeg-turbo in the extension mimae._C (csrc/jpeg.cpp), without Python's lock.

A file that its functions refuse, as all do where the extension is not built, takes the way of decode.py: this costs
time, and changes neither pixels nor which images are bad.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from mimae.data.pixels.augment import Window
from mimae.kernels import native


class Header(NamedTuple):
    """Facts from the header of a baseline JPEG."""

    height: int
    width: int
    """In stored pixels."""
    orientation: int
    """EXIF orientation, 1 to 8."""


_ROOM = 1 << 16
"""Bytes by which a transcoded file may exceed 1.5 times the original's."""

_FUNCTIONS = {
    "mimae_jpeg_header": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]),
    "mimae_jpeg_scaled_region": (
        ctypes.c_int,
        [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p],
    ),
    "mimae_jpeg_transcode": (
        ctypes.c_size_t,
        [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t],
    ),
}


def _load() -> ctypes.CDLL | None:
    """Return the extension, if it is built with libjpeg-turbo."""
    spec = find_spec("mimae._C") if native.LOADED else None
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        return None
    return library


_library = _load()


def obstacle() -> str | None:
    """Return the reason for which the extension decodes no JPEG here, or None."""
    if _library is not None:
        return None
    return native.missing() or "mimae._C is built without libjpeg-turbo"


@contextmanager
def unused() -> Iterator[None]:
    """Refuse every file inside the `with` block, as where the extension is not built: for comparisons."""
    global _library
    kept, _library = _library, None
    try:
        yield
    finally:
        _library = kept


def header(data: bytes) -> Header | None:
    """Return the header of a JPEG that is one baseline scan and ends where the file does, grey or YCbCr.

    None for all other files, and for those that Pillow might understand in another way.
    """
    found = (ctypes.c_int32 * 3)()
    if _library is None or not _library.mimae_jpeg_header(data, len(data), found):
        return None
    return Header(*found)


def region(data: bytes, window: Window, scale: int = 1) -> Tensor | None:
    """Return a window of the stored pixels of a JPEG with a `header`, RGB uint8 (height, width, 3).

    With a `scale` of 2, 4 or 8 the window is one of the image that libjpeg decodes at 1/2, 1/4 or 1/8 of its size. The
    pixels are those of the whole image, but only this region of it is decoded. None if there is no header, or if
    libjpeg reports an error or a warning.
    """
    if _library is None:
        return None
    pixels = torch.empty((window.height, window.width, 3), dtype=torch.uint8)
    done = _library.mimae_jpeg_scaled_region(data, len(data), (ctypes.c_int32 * 4)(*window), scale, pixels.data_ptr())
    return pixels if done else None


def transcoded(data: bytes) -> bytes | None:
    """Return a JPEG with the same coefficients and metadata whose regions are faster to decode.

    It is one baseline scan with optimized Huffman codes, and with restart markers that divide it into columns. None if
    the file cannot be read without a warning, or has something that would get lost: bytes behind its end, a thumbnail
    of JFIF, unusual flags of Adobe.
    """
    if _library is None:
        return None
    out = ctypes.create_string_buffer(len(data) * 3 // 2 + _ROOM)
    size = _library.mimae_jpeg_transcode(data, len(data), out, len(out))
    return out.raw[:size] if size else None
