"""Sources mixed by weight. An epoch is a stated number of draws, and each source is gone through pass after pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Share
from mimae.data.sources.base import Source
from mimae.data.sources.index import end_to_end

EXTENSIONS = (".yaml", ".yml")
_FORM = """
  draws: 1000000        # samples of an epoch
  sources:              # path: weight; paths relative to this file's folder
    photographs/train: 3
    web-{000..099}.tar: 1"""


class Mixture:
    """Several sources as one: the ids of each follow those of the one before it."""

    def __init__(self, name: str, sources: Sequence[Source], draws: Sequence[int]) -> None:
        self.name, self._sources, self._draws = name, list(sources), list(draws)
        self._starts = end_to_end(np.array([len(source) for source in sources]))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Where all sources have classes, and the same ones."""
        labels = [source.labels for source in self._sources if source.labels is not None]
        alike = all(source.classes == self._sources[0].classes for source in self._sources)
        return np.concatenate(labels) if alike and len(labels) == len(self._sources) else None

    @property
    def classes(self) -> list[str] | None:
        return self._sources[0].classes if self.labels is not None else None

    @property
    def shares(self) -> tuple[Share, ...]:
        return tuple(
            Share(len(source), draws, source.shares[0].blocks) for source, draws in zip(self._sources, self._draws)
        )

    @cached_property
    def fingerprint(self) -> str:
        parts = [f"{source.fingerprint} {draws}" for source, draws in zip(self._sources, self._draws)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def path(self, i: int) -> str:
        source, local = self._of(i)
        return source.path(local)

    def read(self, i: int) -> bytes:
        source, local = self._of(i)
        return source.read(local)

    def _of(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._sources[number], i - int(self._starts[number])


def read_mixture(name: str, file: Path, open_part: Callable[[str, Path], Source]) -> Mixture:
    """The mixture that a YAML file lists; `open_part(path, folder)` opens what it names. Raises DataError."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"cannot read the mixture {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping) or set(content) != {"draws", "sources"}:
        raise DataError(f"{file} is no mixture; one is, for example:{_FORM}")
    total, weights = content["draws"], content["sources"]
    if type(total) is not int or total < 1:
        raise DataError(f"{file}: draws: {total!r} is not a number of samples, an integer from 1 on")
    if not isinstance(weights, Mapping) or not weights:
        raise DataError(f"{file}: sources: {weights!r} is not a list of `path: weight`")
    for path, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"{file}: sources: the weight of {path} is {weight!r}; legal are numbers above 0")
    draws = apportion(total, list(weights.values()))
    if none := [str(path) for path, share in zip(weights, draws) if not share]:
        raise DataError(f"{file}: of {total} draws none is for {', '.join(none)}; raise draws or its weight")
    # Before any is opened: a mixture that names itself would have no end.
    for place in (file.parent / Path(str(path)).expanduser() for path in weights):
        if place.suffix.lower() in EXTENSIONS and place.is_file():
            raise DataError(f"{file}: a mixture holds no other mixtures; list their sources here")
    sources = [open_part(str(path), file.parent) for path in weights]
    return Mixture(name, sources, draws)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares by weight: rounded down, and one more for the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
