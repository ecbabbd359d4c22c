"""Recipes as text: YAML, YAML with the origin of each value, and the reference of all settings."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from mimae.config.layers import text
from mimae.config.recipe import RECIPES, Recipe, Resolved, RunRecipe, resume_of, sections
from mimae.config.section import Section
from mimae.config.texts import escaped, text_keys
from mimae.config.words import legal


def as_yaml(recipe: RunRecipe, without: Container[str] = ()) -> str:
    """Return the recipe as YAML that loads to an equal recipe; the keys in `without` are left out."""
    return "\n".join(line for key, line in _lines(recipe) if key not in without) + "\n"


def explain(resolved: Resolved[Any]) -> str:
    """Return the recipe as YAML, with the origin of each value in a comment."""
    lines = _lines(resolved.recipe)
    column = min(max(len(line) for _, line in lines), 60)
    return "".join(
        f"{line:<{column}}  # {resolved.origins[key]}\n" if key in resolved.origins else f"{line}\n"
        for key, line in lines
    )


def _lines(recipe: RunRecipe) -> list[tuple[str, str]]:
    """Return (dotted key, line) of every key and section, in order."""
    lines = []
    for name, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            lines.append((name, f"{name}:"))
            for key, leaf in value.items():
                is_path = isinstance(leaf, str) and f"{name}.{key}" in text_keys(type(recipe)).paths
                lines.append((f"{name}.{key}", f"  {key}: {text(escaped(leaf) if is_path else leaf)}"))
        else:
            lines.append((name, f"{name}: {text(value)}"))
    return lines


def reference() -> str:
    """Return Markdown tables of every key: default, legal values, meaning."""
    by_name = sections()
    scalars = [name for name in Recipe.model_fields if name not in by_name]
    parts = [
        "# Settings\n\nEvery key of a recipe, its default, its legal values and its meaning. "
        "`mimae config RECIPE [key=value ...]` prints all settings of a recipe. "
        "This page is the output of `mimae settings`.\n\n"
        "The column *resume* says whether a resumed run may change a key: *fixed*: no, because the weights would "
        "change; *free*: yes, and the weights do not change; *rounding*: yes, and the weights change only by "
        "rounding.\n",
        _table("", scalars, Recipe),
    ]
    for name, section in by_name.items():
        meaning = " ".join((section.__doc__ or "").split("\n\n")[0].split())
        tasks = [task for task, tree in RECIPES.items() if name in tree.model_fields]
        if len(tasks) < len(RECIPES):
            meaning += f" Only with task={' or '.join(tasks)}."
        parts.append(f"## {name}\n\n{meaning}\n\n{_table(f'{name}.', list(section.model_fields), section)}")
    return "\n".join(parts)


def rows() -> Iterator[dict[str, Any]]:
    """Yield key, default, legal values, resume and meaning of every key."""
    by_name = sections()
    yield from _rows("", [name for name in Recipe.model_fields if name not in by_name], Recipe)
    for name, section in by_name.items():
        yield from _rows(f"{name}.", list(section.model_fields), section)


def _rows(prefix: str, names: list[str], model: type[Section]) -> Iterator[dict[str, Any]]:
    defaults = model().model_dump(mode="json")
    for name in names:
        yield {
            "key": (key := f"{prefix}{name}"),
            "default": defaults[name],
            "legal": legal(key),
            "resume": resume_of(key),
            "meaning": model.model_fields[name].description or "",
        }


def _table(prefix: str, names: list[str], model: type[Section]) -> str:
    lines = ["| key | default | legal | resume | meaning |", "|---|---|---|---|---|"]
    for row in _rows(prefix, names, model):
        cells = [f"`{row['key']}`", f"`{text(row['default'])}`", row["legal"], row["resume"], row["meaning"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
