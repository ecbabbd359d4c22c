"""Reading recipes: YAML files with `base:`, overrides and mappings, to {dotted key: (value, origin)}.

This file does not know which keys are legal (`config.recipe` does). Problems are collected in a list, so that all are
reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from mimae.config.texts import expanded, unquoted
from mimae.outside.reading import read_text
from mimae.outside.text import printable

LARGEST_FILE = 1 << 16
"""Maximal size of a recipe in bytes."""

LONGEST_TEXT = 4096
"""Maximal length of a value in characters, as written in a recipe. All texts of a recipe stay below LARGEST_FILE."""

MOST_VALUES = 10_000
"""Maximal number of keys and values in a recipe or an override. A value that anchors repeat counts each time."""


class Setting(NamedTuple):
    """A value that a user set, and its origin."""

    value: Any
    origin: str
    note: str = ""
    """A line that a run prints when it starts with this setting."""


Settings = dict[str, Setting]


def shipped() -> dict[str, Path]:
    """Return the paths of the recipes that come with the package, by name."""
    folder = Path(str(resources.files("mimae.configs"))).resolve()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(recipe: str, folder: Path, problems: list[str], wanted_by: str = "") -> Path | None:
    """Return the file of a recipe, given a shipped name or a path relative to `folder`; None for a problem."""
    names = shipped()
    if recipe in names:
        return names[recipe]
    try:
        path = folder / expanded(recipe)
        if path.is_file():
            return path.resolve()
        fault = "is a folder" if path.is_dir() else "is neither a file nor a shipped recipe"
    except (OSError, ValueError) as error:  # A name that is too long, or with a zero byte.
        fault = f"is not a valid file name ({getattr(error, 'strerror', None) or error})"
        recipe = recipe[:80]
    near = difflib.get_close_matches(Path(recipe).stem, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    problems.append(f"{wanted_by}recipe {recipe!r} {fault}; {hint}shipped: {', '.join(names)}")
    return None


def read(path: Path, problems: list[str], chain: tuple[Path, ...] = ()) -> list[Settings]:
    """Return the settings of a file's bases, the deepest base first, and then its own.

    `chain` has the files that led to this one by `base:`; it serves to find circles.
    """
    shown = _show(path)
    if path in chain:
        circle = " -> ".join(_show(p) for p in (*chain[chain.index(path) :], path))
        problems.append(f"the bases of recipes form a circle: {circle}")
        return []
    try:
        node = compose(read_text(path, LARGEST_FILE))
    except OSError as error:
        problems.append(f"{shown}: cannot be read: {error.strerror}")
        return []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problems.append(f"{shown}{'' if mark is None else f':{mark.line + 1}'}: not YAML: {_reason(error)}")
        return []
    if not isinstance(node, yaml.MappingNode):
        what = "empty" if node is None else "text or a list"
        problems.append(f"{shown}: {what}, not a recipe, which has sections such as `masking: {{num_masks: 4}}`")
        return []
    given: Settings = {}
    for key, line, value in _leaves(node, "", f"{shown}:", problems):
        origin = f"{shown}:{line}"
        if key in given:
            problems.append(f"{origin}: {key} is given twice, first at {given[key].origin}")
        else:
            given[key] = Setting(value, origin)
    return with_base(given, path.parent, problems, (*chain, path))


def with_base(given: Settings, folder: Path, problems: list[str], chain: tuple[Path, ...] = ()) -> list[Settings]:
    """Return the settings of the `base` that `given` names (a shipped name or a path in `folder`), and then `given`."""
    own = {key: setting for key, setting in given.items() if key != "base"}
    if "base" not in given:
        return [own]
    name, origin, _ = given["base"]
    if not isinstance(name, str):
        problems.append(f"{origin}: base must be the name or the path of one recipe, not {text(name)}")
        return [own]
    path = find(name, folder, problems, wanted_by=f"{origin}: base ")
    return [own] if path is None else [*read(path, problems, chain), own]


def read_override(override: str, problems: list[str], texts: AbstractSet[str] = frozenset()) -> Settings:
    """Return the settings of one override `section.key=value`.

    The value is YAML, except for the keys in `texts`, whose value is the text as it is written.
    """
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(f"{override!r}: an override is written section.key=value")
        return {}
    if key in texts:
        return {key: Setting(unquoted(value), "override")}
    try:
        node = compose(value)
    except yaml.YAMLError as error:
        problems.append(f"{override!r}: not YAML: {_reason(error)}; quote text with YAML's signs: key='\"text\"'")
        return {}
    if node is None:
        return {key: Setting(None, "override")}
    return {leaf: Setting(found, "override") for leaf, _, found in _leaves(node, key, "override, line ", problems)}


def expand_paths(given: Settings, paths: AbstractSet[str], problems: list[str]) -> Settings:
    """Return the settings with `~` and environment variables replaced in the values of the keys in `paths`.

    Text that a recipe cannot store is a problem: text that is not UTF-8 or longer than LONGEST_TEXT characters.
    """
    found = dict(given)
    for key, (value, origin, note) in given.items():
        if not _is_text(value):
            problems.append(f"{key} = {value} ({origin}): not UTF-8; make a link with another name, and use that")
            found[key] = Setting(printable(value), origin, note)
        elif isinstance(value, str) and (length := len(text(value))) > LONGEST_TEXT:
            problems.append(f"{key} = {value} ({origin}): {length:,} characters; legal are at most {LONGEST_TEXT:,}")
            found[key] = Setting(value[:LONGEST_TEXT], origin, note)
    for key in paths & given.keys():
        value, origin, note = found[key]
        if isinstance(value, str):
            try:
                found[key] = Setting(expanded(value), origin, note)
            except ValueError as error:
                problems.append(f"{key} = {text(value)} ({origin}): {error}")
    return found


def _is_text(value: Any) -> bool:
    """Return True if UTF-8 can encode every text in a value."""
    if isinstance(value, Mapping):
        return all(map(_is_text, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_text, value))
    if not isinstance(value, str):
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_mapping(tree: Mapping[str, Any] | BaseModel, prefix: str = "") -> Settings:
    """Return the settings of a mapping of sections from Python. Of a model only fields that were set are returned."""
    if isinstance(tree, BaseModel):
        tree = tree.model_dump(exclude_unset=True)
    given: Settings = {}
    for name, value in tree.items():
        if isinstance(value, Mapping | BaseModel):
            given |= from_mapping(value, f"{prefix}{name}.")
        else:
            given[f"{prefix}{name}"] = Setting(value, "argument")
    return given


def text(value: Any) -> str:
    """Return a value as a recipe would write it, in one line."""
    return yaml.dump({"": value}, Dumper=_Dumper, width=10**9).partition(": ")[2].rstrip()


class _YAML(yaml.SafeLoader):
    """Loader with YAML 1.2's scalars: 1e-3 is a number; on, off, yes and 2020-01-01 are text. Infinity is left out."""


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which `_YAML` would not read as text, and writes lists in one line."""


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # pattern, first characters, value
    "null": (r"~|null|Null|NULL|", "~nN", lambda _: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda scalar: scalar.lower() == "true"),
    "int": (r"[-+]?[0-9][0-9_]*", "-+0123456789", int),
    "float": (r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789.", float),
}
for _dialect in (_YAML, _Dumper):
    _dialect.yaml_implicit_resolvers = {}
    for _kind, (_pattern, _first, _) in _SCALARS.items():
        _firsts = [*_first, ""] if _kind == "null" else list(_first)
        _dialect.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _firsts)
for _sequence in (list, tuple):
    _Dumper.add_representer(_sequence, lambda d, items: d.represent_sequence(_TAG + "seq", items, flow_style=True))
_Dumper.add_multi_representer(object, lambda d, value: d.represent_str(str(value)))


def compose(source: str, dialect: type[yaml.SafeLoader] | None = None) -> yaml.Node | None:
    """Return the nodes of a YAML text. Raises YAMLError, also for more than MOST_VALUES nodes."""
    try:
        node = yaml.compose(source, dialect or _YAML)
        count = 0 if node is None else _count(node, {})
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or contains itself") from None
    if count > MOST_VALUES:
        raise yaml.YAMLError(f"it has {count:,} keys and values; at most {MOST_VALUES:,} are allowed")
    return node


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of nodes in the tree of `node`. A node that an anchor repeats counts each time."""
    if id(node) not in known:
        below = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = below if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_count(child, known) for child in inner)
    return known[id(node)]


def _leaves(node: yaml.Node, key: str, place: str, problems: list[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield (dotted key, line from 1, value) for each leaf of a YAML node. Problems give the line after `place`."""
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                problems.append(f"{place}{name.start_mark.line + 1}: a key is a name, not a list or a mapping")
                continue
            yield from _leaves(child, f"{key}.{name.value}" if key else name.value, place, problems)
        return
    line = node.start_mark.line + 1
    try:
        yield key, line, _value(node)
    except ValueError as error:
        problems.append(f"{key} ({place}{line}): {error}; a value is null, a boolean, a number, text or a list")


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(child) for child in node.value]
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
        return _SCALARS[kind][2](node.value)
    raise ValueError(f"{kind} is not a supported kind of value")


def _show(path: Path) -> str:
    """Return the path as text; it is relative if it is below the working directory."""
    here = Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
