"""Training, validation and test files that lie together: which of them a path means."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from mimae.data.loading.batch import DataError
from mimae.outside.text import printable

Use = Literal["training", "held-out"]
"""What a source is opened for: data.path, or data.val_path and the test set of a probe."""

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words by which files and folders name a split, as on the Hugging Face hub."""

_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_ORDER: dict[Use, tuple[str, ...]] = {"training": ("train",), "held-out": ("validation", "test")}


def split_of(name: str) -> str | None:
    """Return the split that one of the words in a name stands for; None where none does, or several do."""
    found = {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def by_split(names: Sequence[str]) -> dict[str | None, list[str]]:
    """Return the names of each split, those that name none under None; {} where fewer than two splits are named."""
    groups: dict[str | None, list[str]] = {}
    for name in names:
        groups.setdefault(split_of(name), []).append(name)
    return groups if len(groups.keys() - {None}) > 1 else {}


def choose(place: str, groups: dict[str | None, list[str]], use: Use) -> tuple[list[str], str]:
    """Return the names of the split that is meant, and a note that says so. Raises DataError where none is.

    `place` is the folder in which they lie.
    """
    split = next((split for split in _ORDER[use] if split in groups), None)
    others = {other: names for other, names in groups.items() if other != split}
    listed = ", ".join(f"{other or 'others'}: {_pattern(place, names, groups)}" for other, names in others.items())
    if split is None:
        raise DataError(
            f"{printable(place)} holds several splits and none of them is for {use} ({' or '.join(_ORDER[use])}); "
            f"name one: {listed}"
        )
    return groups[split], (
        f"{printable(place)} holds several splits; {split} is used: {_pattern(place, groups[split], groups)}. "
        f"Others, as for data.{'val_path' if use == 'training' else 'path'}: {listed}"
    )


def _pattern(place: str, names: list[str], groups: dict[str | None, list[str]]) -> str:
    """Return a path that names these files and no others, as far as a pattern can."""
    if len(names) == 1:
        return printable(os.path.join(place, names[0]))
    prefix, ending = os.path.commonprefix(names), os.path.splitext(names[0])[1]  # noqa: RUF071 -- of characters
    every = [name for group in groups.values() for name in group]
    for start in (prefix.rstrip("0123456789"), prefix):
        pattern = f"{start}*{ending}"
        if {name for name in every if fnmatchcase(name, pattern)} == set(names):
            return printable(os.path.join(place, pattern))
    return f"{printable(os.path.join(place, names[0]))} and {len(names) - 1:,} more"
