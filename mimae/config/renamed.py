"""Keys that have a new name or new values: recipes and old runs are read under the old ones, and the user is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mimae.config.layers import Setting, Settings, text
from mimae.outside.text import say


def _trackers(tensorboard: Any) -> Any:
    return (["tensorboard"] if tensorboard else []) if isinstance(tensorboard, bool) else tensorboard


def _checkpointing(old: Any) -> Any:
    return ("full" if old else "none") if isinstance(old, bool) else old


RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "telemetry.tensorboard": ("telemetry.trackers", _trackers),
    "model.checkpointing": ("model.checkpointing", _checkpointing),
}
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
        if new == key:
            if value is not setting.value:
                _tell(f"{key}={text(setting.value)}", setting.origin, f"{new}={text(value)}", "other values by now")
            found[key] = Setting(value, setting.origin)
            continue
        _tell(key, setting.origin, f"{new}={text(value)}", "a new name")
        if new not in given:
            found[new] = Setting(value, f"{setting.origin}, as {key}")
    return found


@cache
def _tell(given: str, origin: str, now: str, what: str) -> None:
    """Say it once in a process for each place."""
    say(f"{given} ({origin}) has {what}: it is read as {now}", error=True)
