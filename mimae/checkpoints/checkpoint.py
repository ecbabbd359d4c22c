"""Checkpoints: all that a run needs to continue, verified before use, and read without running pickled code.

    RUN/checkpoints/step-00001234/   tensors by name in DCP's format (see `dcp`): model.*, optimizer.*, ema.*
                                     state.json, manifest.json (size and SHA-256 of every file)
    RUN/latest                       the name of the last one

No generator's state is kept: all randomness is a function of (seed, epoch, sample) and of the position in state.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from mimae import distributed
from mimae.checkpoints import dcp
from mimae.checkpoints.contents import (
    Manifest,
    describe,
    finite_measures,
    names,
    read_latest,
    read_manifest,
    read_state,
    verify,
)
from mimae.checkpoints.settings import CheckpointSettings
from mimae.errors import CheckpointError
from mimae.outside.files import Folder, sync
from mimae.outside.text import printable, say

T = TypeVar("T")


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]

    def tensors(self, section: str) -> dict[str, Tensor]:
        """The whole tensors of model, optimizer or ema, by name; none where the run has no such section."""
        return dcp.load_whole(self.path, f"{section}.")


def unfinished(run: Path, step: int) -> Path:
    """Return the temporary path of a step's checkpoint; `commit` gives it its final name."""
    return run / "checkpoints" / f".step-{step:08d}.tmp"


def finished(temporary: Path) -> Path:
    """Return the final path that `commit` gives to an `unfinished` checkpoint."""
    return temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))


def use(run: Path, action: Callable[[Checkpoint], T], say: Callable[[str], None] = say) -> tuple[Checkpoint, T] | None:
    """Return the newest checkpoint of a run that is whole and that `action` takes, and what `action` makes of it.

    None where the run has no checkpoint. One that is torn or altered, or for which `action` raises CheckpointError, is
    named through `say` and passed over. Raises CheckpointError when there are some and none can be used. In a process
    group this is a collective: the ranks share the work, and pass over what one of them cannot use.
    """
    found = names(run)
    if (latest := read_latest(run)) not in found and Folder(run).exists("latest"):
        say(f"{run / 'latest'} names {printable(repr(latest))}, which is not there; looking for another checkpoint")
    reasons = []
    for name in found:
        try:
            each = load(run / "checkpoints" / name)
            return each, _together(action, each)
        except CheckpointError as error:
            reasons.append(str(error))
            if name != found[-1]:
                say(f"{error}; trying the one before")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {run / 'checkpoints'} is whole: start in a new run.dir; "
            f"the last one that was tried: {reasons[-1]}"
        )
    return None


def find(run: Path, say: Callable[[str], None] = say) -> Checkpoint | None:
    """Return the newest checkpoint of a run that is whole; see `use`."""
    found = use(run, lambda _: None, say)
    return None if found is None else found[0]


def run_of(path: Path) -> Path:
    """Resolve `path` (a run or a single checkpoint) to its run directory. Raises CheckpointError."""
    run = path if (path / "config.yaml").exists() else path.parent.parent
    if not (run / "config.yaml").exists():
        raise CheckpointError(f"{path} is neither a run directory nor a checkpoint of one: no config.yaml")
    return run


def locate(path: Path) -> tuple[Path, Checkpoint]:
    """Resolve `path` (a run or a single checkpoint) to its run directory and a verified checkpoint."""
    found, _ = use_at(path, lambda _: None)
    return run_of(path), found


def use_at(path: Path, action: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """Do what `use` does with a run, or `action` with the single checkpoint that `path` is. Raises CheckpointError."""
    run = run_of(path)
    if path != run:
        one = load(path)
        return one, _together(action, one)
    found = use(run, action)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return found


def load(path: Path) -> Checkpoint:
    """Verify one checkpoint directory. Raises CheckpointError on every rank, naming what is wrong with which file."""
    state: dict[str, Any] = {}
    wrong = ""
    try:
        manifest = read_manifest(path)
        for name in sorted(manifest)[distributed.rank() :: distributed.world_size()]:
            verify(path, name, manifest)
        state = read_state(path)
    except CheckpointError as error:
        wrong = str(error)
    except OSError as error:
        wrong = f"{path} is not a whole checkpoint: {error}"
    if wrong := next(filter(None, distributed.gather_objects(wrong)), ""):
        raise CheckpointError(wrong)
    return Checkpoint(path, state)


def _together(action: Callable[[Checkpoint], T], found: Checkpoint) -> T:
    """Return what `action` makes of a checkpoint. Raises CheckpointError on every rank where one cannot use it."""
    results, wrong = list[T](), ""
    try:
        results.append(action(found))
    except CheckpointError as error:
        wrong = str(error)
    if wrong := next(filter(None, distributed.gather_objects(wrong)), ""):
        raise CheckpointError(wrong)
    return results[0]


def make_room(temporary: Path, num_bytes: int) -> None:
    """Make the empty directory `unfinished`. Raises CheckpointError where so many bytes do not fit, OSError."""
    for interrupted in temporary.parent.glob(".step-*.tmp"):
        _remove(interrupted)
    temporary.mkdir(parents=True)
    if shutil.disk_usage(temporary).free < num_bytes:
        raise CheckpointError("it does not fit")


def commit(
    temporary: Path,
    state: Mapping[str, Any],
    manifest: Manifest,
    settings: CheckpointSettings,
    passed_over: set[str],
    say: Callable[[str], None] = say,
) -> None:
    """Make a checkpoint of a directory that holds its tensors, on disk: a kill at any moment leaves the one before
    whole. Then points `latest` to it and removes those that are not kept.

    `passed_over`: names of those that this run found damaged and went back behind; the new one's is taken out."""
    inside = Folder(temporary)
    inside.replace("state.json", json.dumps(state, indent=1))
    manifest = manifest | describe([temporary / "state.json", temporary / ".metadata"])
    inside.replace("manifest.json", json.dumps(manifest, indent=1))
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    folder, final = temporary.parent, finished(temporary)
    if os.path.lexists(final):  # A damaged one of the same step, which the resumed run has passed again.
        _remove(final)
    os.replace(temporary, final)
    sync(folder)
    # From here on it is one, and is found without the pointer.
    passed_over.discard(final.name)
    with suppress(OSError):
        _prune(final, settings, passed_over)
    try:
        Folder(folder.parent).replace("latest", final.name + "\n")
    except OSError as error:
        say(f"{folder.parent / 'latest'} cannot be written: {error.strerror}; {final.name} is found without it")


def _prune(newest: Path, settings: CheckpointSettings, passed_over: set[str]) -> None:
    """Remove what is not kept, and what is damaged; the run has gone back behind names after the newest one, and
    behind those passed over. Raises OSError, before anything is removed, where it cannot be read which are kept."""
    others = [newest.parent / name for name in names(newest.parent.parent) if name != newest.name]
    counted = [path for path in [*others, newest] if path <= newest and path.name not in passed_over]
    states = {path: state for path in counted if (state := _state(path)) is not None}
    before = sorted(path for path in states if path < newest)
    kept = {path for path, state in states.items() if state.get("for_good")} | {newest}
    kept |= {*before[len(before) - settings.keep + 1 :]}
    measured = {path: finite_measures(state, settings.best) for path, state in states.items()}
    if judged := {path: value for path, value in measured.items() if value is not None}:
        better = states.get(newest, {}).get("better", {"knn": "max"})  # Older runs did not say which way is better.
        best = max if better.get(settings.best) == "max" else min
        kept.add(best(judged, key=lambda path: judged[path]))
    for path in {*others} - kept:
        _remove(path)


def _state(path: Path) -> dict[str, Any] | None:
    """Return the state of a checkpoint; None for one that is damaged."""
    try:
        return read_state(path)
    except CheckpointError:
        return None


def _remove(path: Path) -> None:
    """Remove a checkpoint, or a link or a file in its place; never what a link leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
