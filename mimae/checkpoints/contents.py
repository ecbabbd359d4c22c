"""Names of checkpoint directories and contents of their JSON files, verified before anything is used. No torch.

A checkpoint may come from an untrusted source, or be damaged. So every name, size and number in it is checked first,
and only regular files inside it are opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mimae.errors import CheckpointError
from mimae.outside.files import Folder
from mimae.outside.text import printable

Manifest = dict[str, dict[str, Any]]
"""Entries with `bytes` and `sha256`, by file name."""

_NAME = re.compile(r"step-(\d{8,15})")
_JSON_BYTES = 1 << 26
"""Largest size in bytes of a JSON file of a checkpoint; an entry for each rank has about 150 bytes."""

_MOST_STEPS = 10**15

_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "samples": int,
    "steps": int,
    "skipped_to": int,
    "data": str,
    "for_good": bool,
    "measures": dict,
    "better": dict,
    "sums": (dict, type(None)),
}


def names(run: Path) -> list[str]:
    """Return the names of all checkpoints in the run, complete or not, newest first."""
    try:
        found = [name for name in os.listdir(run / "checkpoints") if _NAME.fullmatch(name)]
    except OSError:
        return []
    return sorted(found, key=lambda name: (step_of(name), name), reverse=True)


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint."""
    found = _NAME.fullmatch(name)
    assert found is not None, name
    return int(found[1])


def read_latest(run: Path) -> str | None:
    """Return the name in RUN/latest, or None if there is no such file, it cannot be read, or it is empty."""
    try:
        text = Folder(run).read("latest", 4096).decode(errors="replace").strip()
    except OSError:
        return None
    return text or None


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises CheckpointError if it is broken, OSError if the disk fails."""
    state = _read_json(path, "state.json")
    if wrong := wrong_with(state):
        raise CheckpointError(f"{path / 'state.json'} is broken: {wrong}")
    return dict(state)


def read_manifest(path: Path) -> Manifest:
    """Return manifest.json of a checkpoint. Raises CheckpointError if it is broken."""
    manifest = _read_json(path, "manifest.json")
    file = path / "manifest.json"
    if not isinstance(manifest, dict) or not {".metadata", "state.json"} <= manifest.keys():
        raise CheckpointError(f"{file} does not name the files of a checkpoint")
    for name, entry in manifest.items():
        if not is_inside(name):
            raise CheckpointError(f"{file} names {printable(repr(name))}, which is not a file of the checkpoint")
        is_whole = isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        if not is_whole:
            raise CheckpointError(f"{file} lacks the size or SHA-256 of {printable(name)}")
    return dict(manifest)


def is_inside(name: object) -> bool:
    """Return whether a name can be that of a file directly in a checkpoint: no separator, and not `.` or `..`."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.+-]+", name, re.ASCII)) and name not in (".", "..")


def verify(path: Path, name: str, manifest: Manifest) -> None:
    """Raise CheckpointError if a file does not match the manifest."""
    expected, file = manifest[name], path / name
    try:
        with os.fdopen(Folder(path).open(name, os.O_RDONLY), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{file} is torn: {size} bytes of {expected['bytes']}")
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if digest != expected["sha256"]:
        raise CheckpointError(f"{file} was altered: its SHA-256 is not the manifest's")


def describe(files: Iterable[Path]) -> Manifest:
    """Return the manifest's entries of some files."""
    found = {}
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def _read_json(path: Path, name: str) -> Any:
    try:
        text = Folder(path).read(name, _JSON_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: it has no {name}") from error
    except OSError as error:
        if _is_broken(path / name):
            raise CheckpointError(f"{path / name} is broken: {error.strerror}") from error
        raise
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name} is broken: {printable(error)}") from error


def _is_broken(file: Path) -> bool:
    """Return whether a file has a kind or size that no checkpoint has. That is not a failure of the disk."""
    try:
        found = file.lstat()
    except NotADirectoryError:
        return True
    except OSError:
        return False
    return not file.is_file() or file.is_symlink() or found.st_size > _JSON_BYTES


def wrong_with(state: Any) -> str:
    """Return a description of the fault of a state, or an empty text for a valid state."""
    if not isinstance(state, dict):
        return f"it contains {type(state).__name__} instead of a state"
    if not _is_count(state.get("step")) or state["step"] > _MOST_STEPS:
        return f"step = {_shown(state, 'step')}; legal is a number of steps"
    for key, kind in _OPTIONAL.items():
        value = state.get(key)
        if key in state and (not isinstance(value, kind) or (kind is int and not _is_count(value))):
            return f"{key} = {_shown(state, key)}"
    # A state that was kept when steps were skipped is only for `mimae replay`, and lacks the fields of a resumable one.
    if "data" not in state:
        return "it lacks data"
    if not {"steps", "skipped_to"} & state.keys():
        return "it lacks steps"
    for name, value in state.get("measures", {}).items():
        if value is not None and not isinstance(value, float) and not (_is_count(value) and value <= _MOST_STEPS):
            return f"measures.{printable(name)} = {printable(repr(value))[:80]}"
    return ""


def finite_measures(state: dict[str, Any], name: str | None) -> float | None:
    """Return a measure of a state, or None if it is missing or not finite."""
    value = state.get("measures", {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(state: dict[str, Any], key: str) -> str:
    return printable(repr(state[key]))[:80] if key in state else "nothing"
