"""What a run needs to go on: written atomically, verified before it is used, and never by running pickled code.

    RUN/checkpoints/step-00001234/   model.safetensors, optimizer.safetensors, [ema.safetensors], state.json,
                                     manifest.json (size and SHA-256 of each)
    RUN/latest                       the name of the last one

No generator's state is kept: all randomness is a function of (seed, epoch, sample) and of the position in state.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimae.errors import UserError
from mimae.settings import Section


class CheckpointSettings(Section):
    """When the run is saved; it is always saved at its end and on SIGTERM."""

    every_steps: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest")


class CheckpointError(UserError):
    """No checkpoint of the run can be used."""


class Checkpoint(NamedTuple):
    """A verified checkpoint in memory."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes the checkpoint of `step` under a temporary name, syncs it to disk, renames it, points `latest` to it and
    removes all but the newest `keep`. A kill at any moment leaves the previous one whole."""
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for interrupted in folder.glob(".step-*.tmp"):
        shutil.rmtree(interrupted)
    temporary.mkdir(parents=True)
    for name, section in tensors.items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in section.items()},
            temporary / f"{name}.safetensors",
        )
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    manifest = {
        file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(temporary.iterdir())
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    if final.exists():  # A damaged one of the same step, which the resumed run has passed again.
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(folder)
    write_atomically(run / "latest", final.name + "\n")
    # Names after this one are damaged ones that the resumed run went back behind.
    others = sorted(path for path in folder.glob("step-*") if path != final)
    before = [path for path in others if path < final]
    for old in {*others} - {*before[len(before) - keep + 1 :]}:
        shutil.rmtree(old)
    return final


def find(run: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, or None where there is none. A torn or altered one is named
    through `say` and passed over. Raises CheckpointError when there are some and none is whole."""
    pointer = run / "latest"
    names = sorted((path.name for path in (run / "checkpoints").glob("step-*")), reverse=True)
    if pointer.exists() and (latest := pointer.read_text().strip()) not in names:
        say(f"{pointer} names {latest!r}, which is not there; looking for another checkpoint")
    for name in names:
        path = run / "checkpoints" / name
        try:
            return load(path)
        except CheckpointError as error:
            say(f"{error}; trying the one before")
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {run / 'checkpoints'} is whole: start in a new run.dir"
        )
    return None


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint directory. Raises CheckpointError naming what is wrong with which file."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            file = path / name
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} is torn: {file.stat().st_size} bytes of {expected['bytes']}")
            if _digest(file) != expected["sha256"]:
                raise CheckpointError(f"{file} was altered: its SHA-256 is not the manifest's")
        files = [path / name for name in manifest if name.endswith(".safetensors")]
        tensors = {file.stem: load_file(file) for file in files}
        return Checkpoint(path, tensors, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file so that a reader, or a kill, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
