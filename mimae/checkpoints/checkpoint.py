"""What a run needs to go on: verified before it is used, and never by running pickled code.

    RUN/checkpoints/step-00001234/   tensors by name in DCP's format (see `dcp`): model.*, optimizer.*, ema.*
                                     state.json, manifest.json (size and SHA-256 of every file)
    RUN/latest                       the name of the last one

No generator's state is kept: all randomness is a function of (seed, epoch, sample) and of the position in state.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from mimae import distributed
from mimae.checkpoints import dcp
from mimae.config.section import Section
from mimae.errors import UserError

Manifest = dict[str, dict[str, Any]]
"""`bytes` and `sha256` by the file's name."""


class CheckpointSettings(Section):
    """When the run is saved, and what is kept; it is always saved at its end and on SIGTERM."""

    every_steps: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest")
    every_epochs: int | None = Field(
        None, ge=1, description="epochs between checkpoints that are kept for good, beside the newest; null: none"
    )
    best: Literal["knn", "val_rec"] | None = Field(
        None,
        description="keep the best checkpoint by this measure too, saved with each check of "
        "telemetry.probe_every_epochs; null: none",
    )
    background: bool = Field(
        True,
        description="write while training goes on, from a copy in host memory (of weights, moments and average, shared "
        "by the ranks); false: training waits",
    )


class CheckpointError(UserError):
    """No checkpoint of the run can be used, or one could not be written."""


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]

    def tensors(self, section: str) -> dict[str, Tensor]:
        """The whole tensors of model, optimizer or ema, by name; none where the run has no such section."""
        return dcp.load_whole(self.path, f"{section}.")


def unfinished(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written; `commit` gives it its name."""
    return run / "checkpoints" / f".step-{step:08d}.tmp"


def finished(temporary: Path) -> Path:
    """What `commit` makes of an `unfinished` one."""
    return temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))


def names(run: Path) -> list[str]:
    """Of the checkpoints that are there, whole or not, the newest first."""
    return sorted((path.name for path in (run / "checkpoints").glob("step-*")), reverse=True)


def find(run: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, or None where there is none. A torn or altered one is named
    through `say` and passed over. Raises CheckpointError when there are some and none is whole.

    In a process group a collective, in which the ranks share the work."""
    found = names(run)
    pointer = run / "latest"
    if pointer.exists() and (latest := pointer.read_text().strip()) not in found:
        say(f"{pointer} names {latest!r}, which is not there; looking for another checkpoint")
    for name in found:
        try:
            return load(run / "checkpoints" / name)
        except CheckpointError as error:
            say(f"{error}; trying the one before")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {run / 'checkpoints'} is whole: start in a new run.dir"
        )
    return None


def locate(path: Path) -> tuple[Path, Checkpoint]:
    """The run directory, and the newest whole checkpoint of it or the one, that a path is. Raises CheckpointError where
    it is neither."""
    run = path if (path / "config.yaml").exists() else path.parent.parent
    if not (run / "config.yaml").exists():
        raise CheckpointError(f"{path} is neither a run directory nor a checkpoint of one: no config.yaml")
    found = find(run) if path == run else load(path)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return run, found


def load(path: Path) -> Checkpoint:
    """Verifies one checkpoint directory. Raises CheckpointError on every rank, naming what is wrong with which file."""
    state: dict[str, Any] = {}
    wrong = ""
    try:
        manifest: Manifest = json.loads((path / "manifest.json").read_text())
        if not {".metadata", "state.json"} <= manifest.keys():
            raise CheckpointError(f"{path / 'manifest.json'} does not name the files of a checkpoint")
        for name in sorted(manifest)[distributed.rank() :: distributed.world_size()]:
            _verify(path / name, manifest[name])
        state = json.loads((path / "state.json").read_text())
    except CheckpointError as error:
        wrong = str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{path} is not a whole checkpoint: {error}"
    if wrong := next(filter(None, distributed.gather_objects(wrong)), ""):
        raise CheckpointError(wrong)
    return Checkpoint(path, state)


def _verify(file: Path, expected: Mapping[str, Any]) -> None:
    if file.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{file} is torn: {file.stat().st_size} bytes of {expected['bytes']}")
    if _digest(file) != expected["sha256"]:
        raise CheckpointError(f"{file} was altered: its SHA-256 is not the manifest's")


def describe(files: Iterable[Path]) -> Manifest:
    """The manifest's entries of some files."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}


def make_room(temporary: Path, num_bytes: int) -> None:
    """Makes the empty directory `unfinished`. Raises CheckpointError where so many bytes do not fit, OSError."""
    for interrupted in temporary.parent.glob(".step-*.tmp"):
        shutil.rmtree(interrupted)
    temporary.mkdir(parents=True)
    if shutil.disk_usage(temporary).free < num_bytes:
        raise CheckpointError("it does not fit")


def commit(
    temporary: Path,
    state: Mapping[str, Any],
    manifest: Manifest,
    settings: CheckpointSettings,
    passed_over: set[str],
) -> None:
    """Makes a checkpoint of a directory that holds its tensors, on disk: a kill at any moment leaves the one before
    whole. Then points `latest` to it and removes those that are not kept.

    `passed_over`: names of those that this run found damaged and went back behind; the new one's is taken out."""
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    manifest = manifest | describe([temporary / "state.json", temporary / ".metadata"])
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    folder, final = temporary.parent, finished(temporary)
    if final.exists():  # A damaged one of the same step, which the resumed run has passed again.
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync(folder)
    # From here on it is one, and is found without the pointer.
    passed_over.discard(final.name)
    with suppress(OSError):
        _prune(final, settings, passed_over)
    with suppress(OSError):
        write_atomically(folder.parent / "latest", final.name + "\n")


def _prune(newest: Path, settings: CheckpointSettings, passed_over: set[str]) -> None:
    """Removes what is not kept, and what is damaged; the run has gone back behind names after the newest one, and
    behind those passed over. Raises OSError, before anything is removed, where it cannot be read which are kept."""
    others = [path for path in newest.parent.glob("step-*") if path != newest]
    counted = [path for path in [*others, newest] if path <= newest and path.name not in passed_over]
    states = {path: state for path in counted if (state := _state(path)) is not None}
    before = sorted(path for path in states if path < newest)
    kept = {path for path, state in states.items() if state.get("for_good")} | {newest}
    kept |= {*before[len(before) - settings.keep + 1 :]}
    measured = {path: state.get("measures", {}).get(settings.best) for path, state in states.items()}
    if judged := {path: value for path, value in measured.items() if value is not None and math.isfinite(value)}:
        better = states[newest].get("better", {"knn": "max"})  # runs of before did not say which way is better
        best = max if better.get(settings.best) == "max" else min
        kept.add(best(judged, key=lambda path: judged[path]))
    for path in {*others} - kept:
        shutil.rmtree(path)


def _state(path: Path) -> dict[str, Any] | None:
    """None for one that is damaged."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a small file so that a reader, or a kill, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
