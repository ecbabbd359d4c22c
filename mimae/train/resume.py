"""The rules of resuming: which settings may change, and what all ranks have to have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimae import distributed
from mimae.checkpoints import checkpoint
from mimae.checkpoints.checkpoint import Checkpoint
from mimae.checkpoints.saving import Saver
from mimae.config.kept import load_run, newer_keys
from mimae.config.printing import as_yaml
from mimae.config.recipe import FREE_KEYS, RunRecipe, flat
from mimae.data.sources.base import Source
from mimae.engines.base import Engine
from mimae.errors import CheckpointError, RunError
from mimae.telemetry.telemetry import Telemetry
from mimae.train.epoch import read_sums
from mimae.train.run_data import moved_from


def check_config(recipe: RunRecipe, run: Path) -> None:
    """Raise RunError where a run was started with settings that would have made other weights."""
    if not (run / "config.yaml").exists():
        return
    old = flat(load_run(run, (), None, type(recipe)))
    new = flat(recipe)
    changed = [
        f"  {key}: {old[key]!r} in the run, {new[key]!r} now"
        for key in new
        if old[key] != new[key] and key not in FREE_KEYS
    ]
    if changed:
        raise RunError(
            "\n".join([f"{run} was started with other settings; choose another run.dir or go back:", *changed])
        )


def check_ranks(recipe: RunRecipe, run: Path, source: Source) -> None:
    """Raise RunError where ranks would go on from different weights or data: they would average the gradients of
    different models. A collective."""
    mine = {
        "checkpoints (run.dir)": ", ".join(checkpoint.names(run)),
        "data (data.path)": source.fingerprint,
        "settings": as_yaml(recipe),
    }
    for rank, other in enumerate(distributed.gather_objects(mine)):
        for what, value in mine.items():
            if other[what] != value:
                raise RunError(
                    f"ranks {distributed.rank()} and {rank} differ in {what}: {value[:80]!r} and "
                    f"{other[what][:80]!r}; "
                    "run.dir and data.path have to be the same storage on every node"
                )


def resume(
    recipe: RunRecipe, steps: int, source: Source, engine: Engine[Any], saver: Saver, records: Telemetry
) -> tuple[int, dict[str, Any] | None]:
    """Make the run directory of a run of so many `steps`, or take the engine back to its last whole checkpoint.

    Returns the steps that are done, and the sums of the epoch under way where the checkpoint has them. A collective.
    """
    run = Path(recipe.run.dir)
    check_config(recipe, run)
    check_ranks(recipe, run, source)
    passed_over: list[str] = []

    def take(found: Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError for one that is not this run's."""
        if found.state["data"] != source.fingerprint:
            before = "" if moved is None else f", which lay at {moved}"
            raise RunError(f"data.path={recipe.data.path} does not hold the images that {run} was started with{before}")
        if found.state["step"] > steps:
            raise CheckpointError(f"{found.path} is of step {found.state['step']}, and the run has {steps}")
        if "sums" in found.state:
            try:
                read_sums(found.state["sums"])
            except ValueError as error:
                raise CheckpointError(f"{found.path}: {error}") from error
        engine.load(found.path)

    def pass_over(fault: str) -> None:
        passed_over.append(fault)
        records.message(fault)

    moved = moved_from(recipe)
    without = newer_keys(run) if (run / "config.yaml").exists() else []
    found = checkpoint.use(run, take, pass_over)
    step, sums, name = 0, None, None
    if found is not None:
        used, _ = found
        name = used.path.name
        saver.passed_over = {other for other in checkpoint.names(run) if other > name}
        step, sums = int(used.state["step"]), used.state.get("sums")
        records.message(f"resuming {run} at step {step} of {steps}")
    if moved is not None:
        same = ", the same by name and class" if found else ""
        records.message(f"the images are at {recipe.data.path}, and were at {moved}{same}")
    records.rewind(step)
    try:
        records.describe(as_yaml(recipe, without))
    except OSError as error:
        raise RunError(f"{run / str(error.filename)} cannot be written: {error.strerror}") from error
    records.events.add("resume" if found else "start", ranks=distributed.world_size(), checkpoint=name)
    for fault in passed_over:
        records.events.add("fault", what=fault)
    return step, sums
