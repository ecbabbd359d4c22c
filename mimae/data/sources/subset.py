"""A part of a source: a share of each class, or the images that a list names (1 % and 10 % of the labels)."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Share
from mimae.data.sources.base import Source
from mimae.outside.paths import user_path
from mimae.outside.reading import read_text
from mimae.outside.text import printable
from mimae.randomness import Purpose, words

_LONGEST = 1 << 30
"""Maximal number of bytes of a list of names."""

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class Subset:
    """The samples `ids` of a source, in order."""

    def __init__(self, whole: Source, ids: np.ndarray, what: str) -> None:
        if len(whole.shares) > 1:
            raise DataError(
                f"data.subset={what}: {whole.name} is a mixture, whose draws say how much of each source is used; "
                "legal is null, or another data.path"
            )
        self.whole, self.ids, self._what = whole, ids, what

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.whole.labels is None else self.whole.labels[self.ids]

    @property
    def classes(self) -> list[str] | None:
        return self.whole.classes

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        firsts = np.searchsorted(self.ids, self.whole.shares[0].blocks)
        return (Share(len(self), len(self), np.unique(firsts)),)

    @property
    def notes(self) -> tuple[str, ...]:
        each = ""
        if self.labels is not None:
            counts = np.unique(self.labels, return_counts=True)[1]
            each = f", {min(counts)} to {max(counts)} of each of {len(counts)} classes"
        used = f"data.subset={self._what}: {len(self):,} of {len(self.whole):,} images are used{each}"
        return (*self.whole.notes, used)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.whole.fingerprint.encode() + self.ids.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, i: int) -> str:
        return self.whole.path(int(self.ids[i]))

    def read(self, i: int) -> bytes:
        return self.whole.read(int(self.ids[i]))


def subset_of(source: Source, what: str | None) -> Source:
    """Return the part of a source that data.subset names: `10%`, a number of images, or the path of a list of names;
    None: all of it.

    A share or a number is drawn evenly from all classes, the same one in every run. Raises DataError.
    """
    if what is None:
        return source
    if match := _SHARE.fullmatch(what):
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise DataError(f"data.subset={what}: legal is a share above 0 % and at most 100 %")
        return Subset(source, _drawn(source, max(1, round(share * len(source)))), what)
    if what.isdigit():
        if not 0 < int(what) <= len(source):
            raise DataError(f"data.subset={what}: legal is a number of images from 1 to {len(source):,}")
        return Subset(source, _drawn(source, int(what)), what)
    return Subset(source, _named(source, user_path(what)), what)


def _drawn(source: Source, count: int) -> np.ndarray:
    """Return the ascending ids of `count` samples; the sizes of their classes differ by one where there are enough."""
    keys = words(0, Purpose.SUBSET, 0, torch.arange(len(source)), 2).numpy()
    keys = (keys[:, 0] << 31) + (keys[:, 1] >> 1)
    order = np.argsort(keys, kind="stable")
    if source.labels is not None:
        by_class = order[np.argsort(source.labels[order], kind="stable")]
        _, firsts, counts = np.unique(source.labels[by_class], return_index=True, return_counts=True)
        rank = np.empty(len(source), np.int64)
        rank[by_class] = np.arange(len(source)) - np.repeat(firsts, counts)
        order = order[np.argsort(rank[order], kind="stable")]
    return np.sort(order[:count])


def _named(source: Source, file: Path) -> np.ndarray:
    """Return the ascending ids of the samples that a list names, one a line: by the end of their paths, as
    n01440764_10026.JPEG or n01440764/n01440764_10026.JPEG."""
    where = f"data.subset={printable(str(file))}"
    try:
        lines = read_text(file, _LONGEST).splitlines()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", error)
        raise DataError(
            f"{where}: {reason}; legal is a share, as 10%, a number of images, or a list of file names, one a line"
        ) from error
    wanted = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not wanted:
        raise DataError(f"{where} names no image")
    known: dict[str, list[int]] = {}
    for i in range(len(source)):
        known.setdefault(source.path(i).rpartition("/")[2], []).append(i)
    ids, missing = [], []
    for name in wanted:
        places = [i for i in known.get(name.rpartition("/")[2], []) if f"/{source.path(i)}".endswith(f"/{name}")]
        if len(places) > 1:
            raise DataError(
                f"{where}: {printable(name)} is the name of {len(places)} images, {printable(source.path(places[0]))} "
                f"and {printable(source.path(places[1]))} among them; name it with its folder"
            )
        ids += places
        missing += [] if places else [name]
    if missing:
        raise DataError(
            f"{where}: {len(missing):,} of {len(wanted):,} names are not in {printable(source.name)}, "
            f"{printable(missing[0])} among them; an image there is {printable(source.path(0))}"
        )
    return np.sort(np.array(ids, np.int64))
