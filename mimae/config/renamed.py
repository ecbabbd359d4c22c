"""Keys with a new name or new values. Old recipes and runs are read with the old ones, and the user gets a message."""

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
"""The new key and the function that converts the value, by old key."""


def under_new_names(given: Settings) -> Settings:
    """Return settings with all keys under their present names. If both names are given, the new one counts."""
    found: Settings = {}
    for key, setting in given.items():
        if key not in RENAMED:
            found[key] = setting
            continue
        new, convert = RENAMED[key]
        value = convert(setting.value)
        if new == key:
            if value is not setting.value:
                _report_once(f"{key}={text(setting.value)}", setting.origin, f"{new}={text(value)}", "new values")
            found[key] = Setting(value, setting.origin)
            continue
        _report_once(key, setting.origin, f"{new}={text(value)}", "a new name")
        if new not in given:
            found[new] = Setting(value, f"{setting.origin}, as {key}")
    return found


@cache
def _report_once(given: str, origin: str, now: str, what: str) -> None:
    """Print a message about an old key, once per process for each origin."""
    say(f"{given} ({origin}) has {what}: it is read as {now}", error=True)
