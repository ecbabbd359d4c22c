"""File extensions of images in each version of the rules, and notes about files with other extensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mimae.data.settings import INDEX_VERSION
from mimae.outside.text import printable

ENDINGS: dict[int, tuple[str, ...]] = {
    1: ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif"),
    2: (
        *("jpg", "jpeg", "png", "jpe", "jfif", "jif", "mpo", "apng", "webp", "avif", "avifs", "tif", "tiff", "gif"),
        *("bmp", "dib", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    ),
}
"""Extensions of images by `data.index_version`. The newest version has those of all formats that are decoded."""

_KNOWN = {version: frozenset(ending.encode() for ending in endings) for version, endings in ENDINGS.items()}
_AFTER = b"?:!@&#;%"
"""Characters that follow an extension in names made from URLs, as in a.jpg?w=600 and a.jpg:large."""

_NAMED = 6
"""Number of extensions that a note names."""


def is_image_ending(ending: bytes, version: int = INDEX_VERSION) -> bool:
    """Return whether the part of a name after a dot is the extension of an image."""
    if version > 1:
        for at, byte in enumerate(ending):
            if byte in _AFTER:
                ending = ending[:at]
                break
    return ending.lower() in _KNOWN[version]


def is_image(name: bytes, version: int = INDEX_VERSION) -> bool:
    """Return whether a file of this name is treated as an image."""
    _, dot, ending = name.rpartition(b".")
    if dot and is_image_ending(ending, version):
        return True
    if version == 1 or b"?" not in name:
        return False
    _, dot, ending = name.partition(b"?")[0].rpartition(b".")  # The query may contain dots.
    return bool(dot) and is_image_ending(ending, version)


def ending_of(name: bytes) -> str:
    """Return the lower-case extension of a name that is not an image's, for counting; "" if it has none."""
    _, dot, ending = name.rpartition(b"/")[2].rpartition(b".")
    return ending.lower().decode("utf-8", "replace")[:16] if dot else ""


def counted(endings: Counter[str]) -> str:
    """Return a phrase that counts files by extension, the most frequent first."""
    first = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
    shown = [f"{count:,} {_named(ending)}" for ending, count in first]
    rest = endings.total() - sum(count for _, count in first)
    return ", ".join([*shown, *([f"{rest:,} with other extensions"] if rest else [])])


def _named(ending: str) -> str:
    return f".{printable(ending)}" if ending else "without an extension"


def left_out(endings: Counter[str]) -> list[str]:
    """Return a note about files whose extensions are not those of images, or no note if there are none."""
    if not endings:
        return []
    return [f"left out, since their extensions are not those of images: {counted(endings)}"]


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return a phrase with the first few names and the number of the others."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
