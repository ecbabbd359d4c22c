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

    @property
    def name(self) -> str:
        """The name of its directory in the run, also if `path` is a link or `.`."""
        return self.path.resolve().name

    def tensors(self, section: str) -> dict[str, Tensor]:
        """Return the whole tensors of the section model, optimizer or ema, by name; {} if the run has none."""
        return dcp.load_whole(self.path, f"{section}.")


def unfinished(run: Path, step: int) -> Path:
    """Return the temporary path of a step's checkpoint; `commit` gives it its final name."""
    return run / "checkpoints" / f".step-{step:08d}.tmp"


def finished(temporary: Path) -> Path:
    """Return the final path that `commit` gives to an `unfinished` checkpoint."""
    return temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))


def use(run: Path, action: Callable[[Checkpoint], T], say: Callable[[str], None] = say) -> tuple[Checkpoint, T] | None:
    """Return the newest usable checkpoint of a run, and the result of `action` for it.

    Returns None if the run has no checkpoint. A checkpoint that is torn or altered, or for which `action` raises
    CheckpointError, is reported through `say` and passed over. Raises CheckpointError if the run has checkpoints and
    none is usable. In a process group this is a collective: the ranks share the work, and they all pass over a
    checkpoint that one of them cannot use.
    """
    found = names(run)
    if (latest := read_latest(run)) not in found and Folder(run).exists("latest"):
        say(f"{run / 'latest'} names {printable(repr(latest))}, which does not exist; looking for another checkpoint")
    reasons = []
    for name in found:
        try:
            each = load(run / "checkpoints" / name)
            return each, _together(action, each)
        except CheckpointError as error:
            reasons.append(str(error))
            if name != found[-1]:
                say(f"{error}; trying the previous one")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {run / 'checkpoints'} can be used: start in a new run.dir. "
            f"The last one tried: {reasons[-1]}"
        )
    return None


def find(run: Path, say: Callable[[str], None] = say) -> Checkpoint | None:
    """Return the newest usable checkpoint of a run; see `use`."""
    found = use(run, lambda _: None, say)
    return None if found is None else found[0]


def run_of(path: Path) -> Path:
    """Resolve `path` (a run, a single checkpoint, or a link to one) to its run directory. Raises CheckpointError."""
    for run in (path, path.absolute().parent.parent, path.resolve().parent.parent):
        if (run / "config.yaml").exists():
            return run
    raise CheckpointError(f"{path} is neither a run directory nor a checkpoint of one: no config.yaml")


def locate(path: Path) -> tuple[Path, Checkpoint]:
    """Resolve `path` (a run or a single checkpoint) to its run directory and a verified checkpoint."""
    found, _ = use_at(path, lambda _: None)
    return run_of(path), found


def use_at(path: Path, action: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """Apply `use` if `path` is a run, or `action` if it is a single checkpoint. Raises CheckpointError."""
    run = run_of(path)
    if path != run:
        one = load(path)
        return one, _together(action, one)
    found = use(run, action)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return found


def load(path: Path) -> Checkpoint:
    """Verify one checkpoint directory. Raises CheckpointError on every rank, which names the file and its fault."""
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
    """Return the result of `action` for a checkpoint. Raises CheckpointError on every rank if it fails on one."""
    results, wrong = list[T](), ""
    try:
        results.append(action(found))
    except CheckpointError as error:
        wrong = str(error)
    if wrong := next(filter(None, distributed.gather_objects(wrong)), ""):
        raise CheckpointError(wrong)
    return results[0]


def make_room(temporary: Path, num_bytes: int) -> None:
    """Make the empty directory `temporary`.

    Raises CheckpointError if `num_bytes` do not fit on the disk, or OSError.
    """
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
    """Turn a directory with the tensors into a checkpoint, flushed to disk.

    A kill at any moment leaves the previous checkpoint whole. Then `latest` is updated, and checkpoints that
    `settings` do not keep are removed. `passed_over` has the names of damaged checkpoints that this run resumed from
    before; the new one's name is removed from it.
    """
    inside = Folder(temporary)
    inside.replace("state.json", json.dumps(state, indent=1))
    manifest = manifest | describe([temporary / "state.json", temporary / ".metadata"])
    inside.replace("manifest.json", json.dumps(manifest, indent=1))
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    folder, final = temporary.parent, finished(temporary)
    if os.path.lexists(final):  # A damaged checkpoint of this step, which the resumed run has reached again.
        _remove(final)
    os.replace(temporary, final)
    sync(folder)
    # From here on the checkpoint is valid, and is found without `latest`.
    passed_over.discard(final.name)
    with suppress(OSError):
        _prune(final, settings, passed_over)
    try:
        Folder(folder.parent).replace("latest", final.name + "\n")
    except OSError as error:
        say(f"{folder.parent / 'latest'} cannot be written: {error.strerror}; {final.name} is found without it")


def _prune(newest: Path, settings: CheckpointSettings, passed_over: set[str]) -> None:
    """Remove the checkpoints that are damaged or not kept.

    Names after `newest`, and those in `passed_over`, belong to a part of the run that was repeated; they do not count.
    Raises OSError, before anything is removed, if a state cannot be read.
    """
    others = [newest.parent / name for name in names(newest.parent.parent) if name != newest.name]
    counted = [path for path in [*others, newest] if path <= newest and path.name not in passed_over]
    states = {path: state for path in counted if (state := _state(path)) is not None}
    before = sorted(path for path in states if path < newest)
    kept = {path for path, state in states.items() if state.get("for_good")} | {newest}
    kept |= {*before[max(len(before) - settings.keep + 1, 0) :]}
    measured = {path: finite_measures(state, settings.best) for path, state in states.items()}
    if judged := {path: value for path, value in measured.items() if value is not None}:
        better = states.get(newest, {}).get("better", {"knn": "max"})  # Older runs do not record a direction.
        best = max if better.get(settings.best) == "max" else min
        kept.add(best(judged, key=lambda path: judged[path]))
    for path in {*others} - kept:
        _remove(path)


def _state(path: Path) -> dict[str, Any] | None:
    """Return the state of a checkpoint, or None for a damaged one."""
    try:
        return read_state(path)
    except CheckpointError:
        return None


def _remove(path: Path) -> None:
    """Remove a checkpoint, or a link or file in its place. The target of a link is never removed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
