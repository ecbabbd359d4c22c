"""Names of checkpoint directories and contents of their JSON files, verified before anything is used. No torch.

A checkpoint may come from a stranger, or be damaged: every name, size and number in it is looked at first, and only
regular files inside of it are opened.
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
"""`bytes` and `sha256` by the file's name."""

_NAME = re.compile(r"step-(\d{8,15})")
_JSON_BYTES = 1 << 26
"""The most that a JSON file of a checkpoint may have: an entry of 150 bytes for each rank is far below."""

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
    """Return the name in RUN/latest; None where there is no such file, or it cannot be read or is empty."""
    try:
        text = Folder(run).read("latest", 4096).decode(errors="replace").strip()
    except OSError:
        return None
    return text or None


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises CheckpointError for one that is broken, OSError for a failing disk."""
    state = _read_json(path, "state.json")
    if wrong := wrong_with(state):
        raise CheckpointError(f"{path / 'state.json'} is broken: {wrong}")
    return dict(state)


def read_manifest(path: Path) -> Manifest:
    """Return manifest.json of a checkpoint. Raises CheckpointError for one that is broken."""
    manifest = _read_json(path, "manifest.json")
    file = path / "manifest.json"
    if not isinstance(manifest, dict) or not {".metadata", "state.json"} <= manifest.keys():
        raise CheckpointError(f"{file} does not name the files of a checkpoint")
    for name, entry in manifest.items():
        if not is_inside(name):
            raise CheckpointError(f"{file} names {printable(repr(name))}, which is no file of the checkpoint")
        is_whole = isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        if not is_whole:
            raise CheckpointError(f"{file} does not say the size and SHA-256 of {printable(name)}")
    return dict(manifest)


def is_inside(name: object) -> bool:
    """Return whether a name is that of a file right in a checkpoint: it has no separator and leads nowhere else."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.+-]+", name, re.ASCII)) and name not in (".", "..")


def verify(path: Path, name: str, manifest: Manifest) -> None:
    """Raise CheckpointError where a file is not what the manifest says."""
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
    """Return whether a file is of a kind or a size that no checkpoint has, which is no fault of the disk."""
    try:
        found = file.lstat()
    except NotADirectoryError:
        return True
    except OSError:
        return False
    return not file.is_file() or file.is_symlink() or found.st_size > _JSON_BYTES


def wrong_with(state: Any) -> str:
    """Return what is wrong with a state, in words; nothing where it is right."""
    if not isinstance(state, dict):
        return f"it holds no state, but {type(state).__name__}"
    if not _is_count(state.get("step")) or state["step"] > _MOST_STEPS:
        return f"step = {_shown(state, 'step')}; legal is a number of steps"
    for key, kind in _OPTIONAL.items():
        value = state.get(key)
        if key in state and (not isinstance(value, kind) or (kind is int and not _is_count(value))):
            return f"{key} = {_shown(state, key)}"
    # What was kept when steps were skipped is for `mimae replay` alone, and says nothing of the run's end.
    if "data" not in state:
        return "it lacks data"
    if not {"steps", "skipped_to"} & state.keys():
        return "it lacks steps"
    for name, value in state.get("measures", {}).items():
        if value is not None and not isinstance(value, float) and not (_is_count(value) and value <= _MOST_STEPS):
            return f"measures.{printable(name)} = {printable(repr(value))[:80]}"
    return ""


def finite_measures(state: dict[str, Any], name: str | None) -> float | None:
    """Return a measure of a state; None where it has none that is finite."""
    value = state.get("measures", {}).get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(state: dict[str, Any], key: str) -> str:
    return printable(repr(state[key]))[:80] if key in state else "nothing"
