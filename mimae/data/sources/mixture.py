"""Mixtures of sources by weight. An epoch is a given number of draws, and each source is read pass after pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mimae.config.layers import LARGEST_FILE, compose
from mimae.config.texts import expanded
from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Share
from mimae.data.sources.base import Source
from mimae.data.sources.index import end_to_end
from mimae.outside.reading import read_text
from mimae.outside.text import printable

EXTENSIONS = (".yaml", ".yml")
_MOST_DRAWS = 10**15
_LARGEST_WEIGHT = 1e100
_FORM = """
  draws: 1000000        # samples of an epoch
  sources:              # path: weight; paths relative to this file's folder
    photographs/train: 3
    web-{000..099}.tar: 1"""


class Mixture:
    """Several sources as one. The ids of each source follow those of the source before it."""

    def __init__(self, name: str, sources: Sequence[Source], draws: Sequence[int]) -> None:
        self.name, self._sources, self._draws = name, list(sources), list(draws)
        self._starts = end_to_end(np.array([len(source) for source in sources]))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64 (n,): the class of each sample; None unless all sources have the same classes."""
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

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [f"{printable(source.name)}: {note}" for source in self._sources for note in source.notes]
        if self.labels is None and any(source.labels is not None for source in self._sources):
            notes.append("no sample has a class, since not all sources have the same ones")
        return tuple(notes)

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


def read_mixture(name: str, file: Path, open_part: Callable[[str, Path], Source], version: int) -> Mixture:
    """Return the mixture that a YAML file describes. `open_part(path, folder)` opens its sources. Raises DataError."""
    shown = printable(str(file))
    content = _read(file, shown)
    total, weights = content["draws"], content["sources"]
    if type(total) is not int or not 1 <= total <= _MOST_DRAWS:
        raise DataError(
            f"{shown}: draws: {repr(total)[:80]} is not a number of samples, an integer from 1 to {_MOST_DRAWS:,}"
        )
    if not isinstance(weights, _Weights) or not weights.pairs:
        raise DataError(f"{shown}: sources: {repr(weights)[:80]} is not a list of `path: weight`")
    for path, weight, _ in weights.pairs:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= _LARGEST_WEIGHT:
            raise DataError(
                f"{shown}: sources: the weight of {path} is {repr(weight)[:80]}; weights are numbers above 0, at most "
                f"{_LARGEST_WEIGHT:g}"
            )
    paths, numbers = _distinct(weights, file, version)
    draws = apportion(total, numbers)
    if none := [path for path, share in zip(paths, draws) if not share]:
        raise DataError(f"{shown}: none of {total} draws is for {', '.join(none)}; raise draws or its weight")
    # This is checked before any source is opened: a mixture that names itself would recurse forever.
    for place in (file.parent / path for path in paths):
        if place.suffix.lower() in EXTENSIONS and place.is_file():
            raise DataError(f"{shown}: a mixture cannot contain other mixtures; list their sources here")
    sources = [open_part(path, file.parent) for path in paths]
    return Mixture(name, sources, draws)


class _Weights(NamedTuple):
    """The sources of a mixture as written in its file: path, weight, line number."""

    pairs: list[tuple[str, Any, int]]


def _read(file: Path, shown: str) -> dict[str, Any]:
    """Return the content of a mixture's file under `draws` and `sources`. Raises DataError."""
    content: dict[str, Any] = {}
    try:
        node = compose(read_text(file, LARGEST_FILE), yaml.SafeLoader)
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in content:
                raise DataError(f"{shown}, line {key.start_mark.line + 1}: {key.value} is given twice")
            content[str(key.value)] = _pairs(value) if isinstance(value, yaml.MappingNode) else _value(value)
    except OSError as error:
        raise DataError(f"cannot read the mixture {shown}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DataError(f"cannot read the mixture {shown}: {' '.join(str(error).split())}") from error
    if content.keys() != {"draws", "sources"}:
        raise DataError(f"{shown} is not a mixture; an example of one is:{_FORM}")
    return content


def _pairs(node: yaml.MappingNode) -> _Weights:
    """Return the pairs of a mapping. Paths are taken literally: 00010 is a folder and not a number.

    Raises YAMLError for a path that is a list or a mapping.
    """
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"line {key.start_mark.line + 1}: a source is one path, not a list or a mapping")
    return _Weights([(str(key.value), _value(value), key.start_mark.line + 1) for key, value in node.value])


def _value(node: yaml.Node) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        return node.value


def _distinct(weights: _Weights, file: Path, version: int) -> tuple[list[str], list[float]]:
    """Return the paths, with `~` and variables expanded, and their weights. Raises DataError if two are equal.

    In version 1 the last weight of a path counts, and paths that look like numbers are numbers.
    """
    if version == 1:
        last = {str(_value(yaml.ScalarNode(_tag(path), path))): weight for path, weight, _ in weights.pairs}
        return list(last), list(last.values())
    paths, seen = [], dict[str, tuple[str, int]]()
    for path, _, line in weights.pairs:
        try:
            paths.append(expanded(path))
        except ValueError as error:
            raise DataError(f"{printable(str(file))}, line {line}: {path}: {error}") from error
        place = os.path.realpath(os.path.join(file.parent, paths[-1]))
        if place in seen:
            first, at = seen[place]
            raise DataError(
                f"{printable(str(file))}: {path} (line {line}) is the same source as {first} (line {at}); "
                f"name it once, with the sum of the weights"
            )
        seen[place] = path, line
    return paths, [weight for _, weight, _ in weights.pairs]


def _tag(scalar: str) -> str:
    return str(yaml.SafeLoader("").resolve(yaml.ScalarNode, scalar, (True, False)))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` into integer shares by weight: round down, then add one to those with the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
