"""Choice of a split if training, validation and test files are in the same folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from mimae.data.loading.batch import DataError
from mimae.outside.text import printable

Use = Literal["training", "held-out"]
"""Purpose of a source: "training" is data.path; "held-out" is data.val_path and the test set of a probe."""

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in names of files and folders that denote a split, as on the Hugging Face hub."""

_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_ORDER: dict[Use, tuple[str, ...]] = {"training": ("train",), "held-out": ("validation", "test")}


def split_of(name: str) -> str | None:
    """Return the split that the words in a name denote; None if they denote none or several."""
    found = {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def by_split(names: Sequence[str]) -> dict[str | None, list[str]]:
    """Group names by split, with None for names without a split. Returns {} if they have fewer than two splits."""
    groups: dict[str | None, list[str]] = {}
    for name in names:
        groups.setdefault(split_of(name), []).append(name)
    return groups if len(groups.keys() - {None}) > 1 else {}


def choose(place: str, groups: dict[str | None, list[str]], use: Use) -> tuple[list[str], str]:
    """Return the names of the split to use, and a note about the choice. Raises DataError if no split fits.

    `place` is the folder that contains them.
    """
    split = next((split for split in _ORDER[use] if split in groups), None)
    others = {other: names for other, names in groups.items() if other != split}
    listed = ", ".join(f"{other or 'others'}: {_pattern(place, names, groups)}" for other, names in others.items())
    if split is None:
        raise DataError(
            f"{printable(place)} contains several splits and none of them is for {use} ({' or '.join(_ORDER[use])}); "
            f"name one: {listed}"
        )
    return groups[split], (
        f"{printable(place)} contains several splits; {split} is used: {_pattern(place, groups[split], groups)}. "
        f"Others, for example for data.{'val_path' if use == 'training' else 'path'}: {listed}"
    )


def _pattern(place: str, names: list[str], groups: dict[str | None, list[str]]) -> str:
    """Return a path or pattern that matches these files only, or a phrase if there is no such pattern."""
    if len(names) == 1:
        return printable(os.path.join(place, names[0]))
    prefix, ending = os.path.commonprefix(names), os.path.splitext(names[0])[1]  # noqa: RUF071 -- of characters
    every = [name for group in groups.values() for name in group]
    for start in (prefix.rstrip("0123456789"), prefix):
        pattern = f"{start}*{ending}"
        if {name for name in every if fnmatchcase(name, pattern)} == set(names):
            return printable(os.path.join(place, pattern))
    return f"{printable(os.path.join(place, names[0]))} and {len(names) - 1:,} more"
