"""Keys that have a new name: recipes and old runs are read under the old one, and the user is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mimae.config.layers import Setting, Settings, text
from mimae.outside.text import say


def _trackers(tensorboard: Any) -> Any:
    return (["tensorboard"] if tensorboard else []) if isinstance(tensorboard, bool) else tensorboard


RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {"telemetry.tensorboard": ("telemetry.trackers", _trackers)}
"""New key by old key, and the function that converts the value."""


def under_new_names(given: Settings) -> Settings:
    """Return settings with all keys under their present names. A key that is given under both keeps the new one."""
    found: Settings = {}
    for key, setting in given.items():
        if key not in RENAMED:
            found[key] = setting
            continue
        new, convert = RENAMED[key]
        value = convert(setting.value)
        _tell(key, setting.origin, f"{new}={text(value)}")
        if new not in given:
            found[new] = Setting(value, f"{setting.origin}, as {key}")
    return found


@cache
def _tell(key: str, origin: str, now: str) -> None:
    """Say it once in a process for each place."""
    say(f"{key} ({origin}) has a new name: it is read as {now}", error=True)
