"""Which names are those of images, by their endings, in each version of the rules; and a word on those that are not."""

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
"""Endings of images by `data.index_version`: the newest are those of the formats that `pixels.decode` reads."""

_KNOWN = {version: frozenset(ending.encode() for ending in endings) for version, endings in ENDINGS.items()}
_AFTER = b"?:!@&#;%"
"""Characters that addresses put behind an ending, as in a.jpg?w=600 and a.jpg:large."""

_NAMED = 6
"""Endings that a note names."""


def is_image_ending(ending: bytes, version: int = INDEX_VERSION) -> bool:
    """Return whether what follows a dot in a name is the ending of an image."""
    if version > 1:
        for at, byte in enumerate(ending):
            if byte in _AFTER:
                ending = ending[:at]
                break
    return ending.lower() in _KNOWN[version]


def is_image(name: bytes, version: int = INDEX_VERSION) -> bool:
    """Return whether a file of this name is taken for an image."""
    _, dot, ending = name.rpartition(b".")
    if dot and is_image_ending(ending, version):
        return True
    if version == 1 or b"?" not in name:
        return False
    _, dot, ending = name.partition(b"?")[0].rpartition(b".")  # The query has dots of its own.
    return bool(dot) and is_image_ending(ending, version)


def ending_of(name: bytes) -> str:
    """Return the ending of a name that is no image's, in small letters, for counting; "" where it has none."""
    _, dot, ending = name.rpartition(b"/")[2].rpartition(b".")
    return ending.lower().decode("utf-8", "replace")[:16] if dot else ""


def counted(endings: Counter[str]) -> str:
    """Return a phrase that counts files by their endings, the most frequent first."""
    first = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
    shown = [f"{count:,} {_named(ending)}" for ending, count in first]
    rest = endings.total() - sum(count for _, count in first)
    return ", ".join([*shown, *([f"{rest:,} with other endings"] if rest else [])])


def _named(ending: str) -> str:
    return f".{printable(ending)}" if ending else "without an ending"


def left_out(endings: Counter[str]) -> list[str]:
    """Return a note on the files that are no images by their endings; no note where there are none."""
    if not endings:
        return []
    return [f"left out, since their endings are not those of images: {counted(endings)}"]


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
