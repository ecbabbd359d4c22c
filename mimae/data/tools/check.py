"""`mimae data check`: checks every sample of a source with the rules of the loader."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimae.data.loading.batch import BadSample
from mimae.data.loading.processes import over
from mimae.data.pixels.augment import Window
from mimae.data.pixels.cut import Turn, finish
from mimae.data.pixels.decode import BadImage, brightest, look, region, why
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.data.tools.duplicates import near_duplicates, perceptual_hash, same
from mimae.outside.text import as_file, printable

_CHUNK = 256
"""Largest number of samples that a process takes at a time."""

_SHOWN = 10

_SIZES = [("height", "i4"), ("width", "i4"), ("bytes", "i8")]
SAMPLE = np.dtype([("ok", "?"), ("format", "S8"), *_SIZES, ("digest", "V16"), ("look", "u8"), ("brightest", "i4")])
"""Record of one sample. `look` is its perceptual hash, `brightest` its largest 16-bit value or -1 for 8-bit images."""

_DARK = 1 << 15
"""A set of 16-bit images whose largest value is below this looks dark."""

_SIDE = 4096
"""Longest side in pixels for the perceptual hash. Longer images are subsampled, because their resize is costly."""


class Report(NamedTuple):
    """Result of `check`."""

    source: Source
    samples: np.ndarray
    """SAMPLE (n,): one record per sample."""
    broken: list[BadSample]
    exact: list[list[int]]
    """Groups of ids of samples with equal bytes."""
    near: list[list[int]]
    """Groups of ids of samples that look alike; of samples with equal bytes only the first is considered."""


def check(path: str, settings: DataSettings, workers: int) -> Report:
    """Read and decode every sample of the source at `path`. Raises DataError."""
    source = open_source(path, settings=settings)
    samples, broken = np.zeros(len(source), SAMPLE), list[BadSample]()
    size = max(1, min(_CHUNK, len(source) // (8 * workers)))
    chunks = [range(first, min(first + size, len(source))) for first in range(0, len(source), size)]
    results = over(chunks, _look_at, (source, settings), workers=workers, title="checking", unit="parts")
    for ids, (looked_at, bad) in zip(chunks, results):
        samples[ids.start : ids.stop] = looked_at
        broken += bad
    ok = np.flatnonzero(samples["ok"])
    exact = same(samples["digest"][ok], ok)
    # One image represents all images with the same bytes.
    others = np.setdiff1d(ok, [i for group in exact for i in group[1:]])
    return Report(source, samples, broken, exact, near_duplicates(samples["look"][others], others))


def _look_at(shared: tuple[Source, DataSettings], ids: range) -> tuple[np.ndarray, list[BadSample]]:
    """Check a chunk of samples."""
    source, settings = shared
    samples, bad = np.zeros(len(ids), SAMPLE), []
    for row, i in enumerate(ids):
        try:
            data = source.read(i)
            samples[row] = _sample(data, settings)
        except (BadImage, OSError) as error:
            bad.append(BadSample(i, source.path(i), why(error)))
    return samples, bad


def _sample(data: bytes, settings: DataSettings) -> tuple[Any, ...]:
    """Return a sample's record (SAMPLE). Raises BadImage for images that the loader would replace."""
    encoded = look(data, settings.max_pixels, settings.range)
    deepest = brightest(encoded)
    pixels = torch.from_numpy(region(look(data, settings.max_pixels, settings.range), _whole))
    height, width = pixels.shape[:2]
    small = finish(pixels[:: -(-height // _SIDE), :: -(-width // _SIDE)], (8, 9), Turn()).numpy()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    image_format = str(encoded.image.format)
    return (
        True,
        image_format,
        height,
        width,
        len(data),
        digest,
        perceptual_hash(small),
        -1 if deepest is None else deepest,
    )


def _whole(height: int, width: int) -> Window:
    return Window(0, 0, height, width)


# The report


def _dark(brightest: np.ndarray, white: int | None) -> list[str]:
    """Return a note if 16-bit images use only a small part of the range."""
    deep = brightest[brightest >= 0]
    if white is not None or not len(deep) or deep.max() >= _DARK:
        return []
    most = int(deep.max())
    return [
        f"{len(deep):,} images of 16 bits per channel have values up to {most:,}: their brightest pixel becomes "
        f"{(most * 255 + 32767) // 65535} of 255: data.range={(1 << most.bit_length()) - 1} makes it white (colour "
        f"images have to be PNG; convert others)"
    ]


def summary(report: Report, white: int | None = None) -> dict[str, Any]:
    """Return the report for JSON: counts, sizes, and the paths of broken and duplicate samples.

    `white` is data.range.
    """
    source, good = report.source, report.samples[report.samples["ok"]]
    labels = None if source.labels is None else Counter(source.labels.tolist())
    return {
        "source": source.name,
        "notes": [*source.notes, *_dark(good["brightest"], white)],
        "samples": len(source),
        "readable": len(good),
        "bytes": int(good["bytes"].sum()),
        "formats": dict(Counter(name.decode() for name in good["format"].tolist()).most_common()),
        "sides": {name: _spread(good[name]) for name in ("height", "width")},
        "classes": labels and {"count": len(labels), "smallest": min(labels.values()), "largest": max(labels.values())},
        "broken": [bad._asdict() for bad in report.broken],
        "exact_duplicates": [[source.path(i) for i in group] for group in report.exact],
        "near_duplicates": [[source.path(i) for i in group] for group in report.near],
    }


def _spread(values: np.ndarray) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"min": int(values.min()), "median": int(statistics.median_low(values.tolist())), "max": int(values.max())}


def show(found: dict[str, Any]) -> None:
    title = Text(printable(found["source"]), "table.title")
    table = Table(title=title, title_justify="left", show_header=False)
    broken, readable = len(found["broken"]), found["readable"]
    table.add_row("samples", f"{found['samples']:,}")
    table.add_row("readable", f"{readable:,}, {found['bytes'] / 1e6:,.1f} MB")
    table.add_row("broken", f"{broken:,}" + (f" ({broken / found['samples']:.3%})" if broken else ""))
    table.add_row("formats", ", ".join(f"{name} {count:,}" for name, count in found["formats"].items()))
    for side, spread in found["sides"].items():
        table.add_row(side, "{min} to {max}, median {median}".format(**spread) if spread else "")
    classes = found["classes"]
    table.add_row(
        "classes", "{count:,}, of {smallest:,} to {largest:,} samples".format(**classes) if classes else "unknown"
    )
    for key, row in (("exact_duplicates", "identical bytes"), ("near_duplicates", "similar images")):
        spare = sum(len(group) - 1 for group in found[key])
        table.add_row(row, f"{spare:,}, in addition to the {len(found[key]):,} they repeat" if spare else "none")
    console = Console(file=as_file(), soft_wrap=True)
    console.print(table)
    for note in found["notes"]:
        console.print(note, markup=False, highlight=False)
    _list(console, "broken", [f"{bad['path']}: {bad['reason']}" for bad in found["broken"]])
    _list(console, "identical bytes", [" = ".join(group) for group in found["exact_duplicates"]])
    _list(console, "similar images", [" ~ ".join(group) for group in found["near_duplicates"]])


def _list(console: Console, title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    console.print(f"\n{title}:", markup=False)
    for line in lines[:_SHOWN]:
        console.print("  " + printable(line), markup=False, highlight=False)
    if len(lines) > _SHOWN:
        console.print(f"  and {len(lines) - _SHOWN:,} more; --json lists all")
