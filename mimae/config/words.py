"""Texts about settings: the legal values of a key, and the messages for unknown keys and illegal values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from mimae.config.layers import Setting, Settings, text
from mimae.config.recipe import RECIPES, RunRecipe, keys, schemas, sections


def strange_task(given: Settings, kind: type[RunRecipe]) -> str:
    """Return the message for a task that does not exist or that the caller cannot use."""
    legal = ", ".join(task for task, tree in RECIPES.items() if issubclass(tree, kind))
    setting = given.get("task", Setting("pretrain", "default"))
    others = "; `mimae --help` lists the commands for the other tasks" if str(setting.value) in RECIPES else ""
    return f"task = {text(setting.value)} ({setting.origin}): legal here is {legal}{others}"


def elsewhere(key: str, setting: Setting, tree: type[RunRecipe]) -> str | None:
    """Return the message for a key that only recipes of other tasks than `tree` have, or None if no task has it."""
    tasks = [task for task, other in RECIPES.items() if key in (*keys(other), *sections(other))]
    if not tasks or key in sections(tree):
        return None
    own = tree.model_fields["task"].default
    return f"{key} ({setting.origin}): a key of task={' or '.join(tasks)}; this recipe has task={own}"


def unknown(key: str, setting: Setting, tree: type[RunRecipe]) -> str:
    """Return the message for an unknown key, with the nearest known key.

    The similarity of the last part of a key decides, and the similarity of the section breaks ties.
    """
    known, by_name = keys(tree), sections(tree)
    if key in by_name:
        return (
            f"{key} = {text(setting.value)} ({setting.origin}): {key} is a section; "
            f"its keys are {', '.join(by_name[key].model_fields)}"
        )
    section, _, name = key.rpartition(".")
    if section in known:
        return f"{key} ({setting.origin}): {section} has no keys of its own; legal is {legal(section)}"

    def likeness(candidate: str) -> tuple[float, float]:
        other_section, _, other_name = candidate.rpartition(".")
        last = difflib.SequenceMatcher(None, name, other_name).ratio()
        whose = difflib.SequenceMatcher(None, section, other_section).ratio() if section else 0
        return last + 0.5 * whose, last

    nearest = max(known, key=likeness)
    if likeness(nearest)[1] >= 0.6:
        return f"{key} ({setting.origin}): unknown key; did you mean {nearest}?"
    whose, fields = (section, by_name[section]) if section in by_name else ("a recipe", tree)
    return f"{key} ({setting.origin}): unknown key; {whose} has {', '.join(fields.model_fields)}"


def illegal(error: ValidationError, given: Settings) -> Iterator[str]:
    """Yield one message per illegal key, even if pydantic reports several errors for it."""

    def told(key: str) -> str:
        return f"{key} = {text(given[key].value)} ({given[key].origin})" if key in given else key

    by_name = sections()
    seen: set[str] = set()
    for detail in error.errors():
        section, *below = map(str, detail["loc"])
        key = f"{section}.{below[0]}" if section in by_name and below else section
        if key in seen:
            continue
        seen.add(key)
        if detail["type"] != "value_error":
            yield f"{told(key)}: legal is {legal(key)}"
            continue
        # The section's own check compares several keys; its message names them.
        reason = str(detail["ctx"]["error"])
        words = re.findall(r"\w+", reason)
        about = [told(k) for k in given if k.startswith(f"{section}.") and k.partition(".")[2] in words]
        yield f"{', '.join(about) or told(key)}: {reason}"


def legal(key: str) -> str:
    """Return a text with the legal values of a dotted key, made from the constraints of its field."""
    if key == "task":
        return " or ".join(", ".join(RECIPES).rsplit(", ", 1))
    schema = schemas()[key]
    example = f", for example {text(schema['examples'][0])}" if schema.get("examples") else ""
    return _in_words(schema) + example


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(_in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(", ".join(map(text, schema["enum"])).rsplit(", ", 1))
    if "const" in schema:
        return text(schema["const"])
    kind = str(schema.get("type"))
    if kind == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        count = f"{len(items)} values" if "prefixItems" in schema else "values"
        each = list(dict.fromkeys(_in_words(item) for item in items))
        return f"a list of {count}" + (f", each {each[0]}" if len(each) == 1 else f": {'; '.join(each)}")
    words = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"{words[kind]} from {low} to {high}"
    bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
    limits = " and ".join(f"{word} {limit}" for word, limit in bounds if limit is not None)
    if schema.get("minLength"):
        limits = "that is not empty"
    return f"{words.get(kind, kind)} {limits}".rstrip()
