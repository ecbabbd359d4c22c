"""Settings that are text: the keys that take text, text in overrides, and the expansion of `~` and `$VAR` in paths."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import NamedTuple

from mimae.config.section import PATH, Section

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)\}|([A-Za-z_]\w*))")
_NONE = ("", "null", "Null", "NULL")


class TextKeys(NamedTuple):
    """The dotted keys of a tree of settings that take any text (`texts`), and those of them that are paths."""

    texts: frozenset[str]
    paths: frozenset[str]


@cache
def text_keys(*trees: type[Section]) -> TextKeys:
    """Return the keys of `trees` that take text. The field of a path has `section.PATH`."""
    texts, paths = set(), set()
    for key, schema in (item for tree in trees for item in tree.schemas().items()):
        for option in schema.get("anyOf", [schema]):
            if option.get("type") == "string" and not {"enum", "const"} & option.keys():
                texts.add(key)
                if option.get("format") == PATH["format"]:
                    paths.add(key)
    return TextKeys(frozenset(texts), frozenset(paths))


def unquoted(value: str) -> str | None:
    """Return the text of an override as it is written, without a pair of quotes around it; None for null."""
    value = value.strip()
    if value in _NONE:
        return None
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def expanded(path: str) -> str:
    """Return the path with `~`, `~user`, `$VAR` and `${VAR}` replaced; `$$` is a dollar sign.

    A path that exists as it is written is not changed. Raises ValueError for an unknown user or variable.
    """
    if "$" in path and not _exists(path):
        path = _VARIABLE.sub(_value, path)
    if path.startswith("~") and (home := os.path.expanduser(path)) == path:
        raise ValueError(f"there is no user {path.partition('/')[0][1:]}; a folder of that name is ./{path}")
    return home if path.startswith("~") else path


def escaped(path: str) -> str:
    """Return the text from which `expanded` makes `path`."""
    return path.replace("$", "$$")


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # A zero byte.
        return False


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name is None:
        return "$"
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set; a dollar sign is written $$")
    return os.environ[name]
