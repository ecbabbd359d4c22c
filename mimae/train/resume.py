"""The rules of resuming: which settings may change, and what has to be equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mimae import distributed
from mimae.checkpoints import checkpoint
from mimae.checkpoints.checkpoint import Checkpoint
from mimae.checkpoints.saving import Saver
from mimae.config.kept import load_run, newer_keys
from mimae.config.layers import text
from mimae.config.printing import as_yaml
from mimae.config.recipe import FREE_KEYS, RunRecipe, flat
from mimae.data.sources.base import Source
from mimae.engines.base import Engine
from mimae.errors import CheckpointError, RunError
from mimae.objective.terms import active
from mimae.optim.resolution import in_words, stages
from mimae.optim.schedule import EXTENDABLE, extended, start, total_steps
from mimae.telemetry.telemetry import Telemetry
from mimae.train.epoch import read_sums
from mimae.train.run_data import moved_from


class Length(NamedTuple):
    """The length of a run."""

    steps: int
    steps_per_epoch: int
    peak: float
    """The peak learning rate."""


class Resumed(NamedTuple):
    """The state from which a run continues."""

    recipe: RunRecipe
    """The recipe; if the run is extended, its schedule is the extended one."""
    step: int
    """Number of steps that are done."""
    sums: dict[str, Any] | None
    """The sums of the current epoch, if the checkpoint has them."""


def check_config(recipe: RunRecipe, run: Path) -> dict[str, Any]:
    """Return the keys of the schedule that extend the run, with their values before the extension.

    Raises RunError if the run was started with other settings that affect the weights.
    """
    if not (run / "config.yaml").exists():
        return {}
    old = flat(load_run(run, (), None, type(recipe)))
    new = flat(recipe)
    free = {*FREE_KEYS} | (set() if _splits_matter(recipe) else {"schedule.accumulate"})
    changed = [key for key in new if old[key] != new[key] and key not in free]
    extends = [key for key in changed if key.removeprefix("schedule.") in EXTENDABLE]
    if changed and (changed != extends or not recipe.run.extend):
        told = [f"  {key}: {old[key]!r} in the run, {new[key]!r} now" for key in changed]
        command = " ".join(["mimae extend", str(run), *(f"{key}={text(new[key])}" for key in extends)])
        hint = [f"to continue from its last step with a new schedule: {command}"] if changed == extends else []
        head = f"{run} was started with other settings; choose another run.dir or restore these settings:"
        raise RunError("\n".join([head, *told, *hint]))
    return {key: old[key] for key in extends}


def _splits_matter(recipe: RunRecipe) -> bool:
    """Return True if the loss depends on how a batch is split into micro-batches.

    It does if a term compares the images of a micro-batch. It may do so for other tasks, whose loss can be a mean over,
    for example, all objects in a micro-batch.
    """
    objective = getattr(recipe, "objective", None)
    return objective is None or any("images" in term.compares for term in active(objective))


def check_ranks(recipe: RunRecipe, run: Path, source: Source) -> None:
    """Raise RunError if ranks would continue with different weights or data. This is a collective.

    Such ranks would average the gradients of different models.
    """
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
                    "run.dir and data.path have to be on storage that all nodes share"
                )


def _before_extension(recipe: RunRecipe, step: int) -> str:
    """Return why a run cannot continue from `step`, or an empty text if it can."""
    first, _ = start(recipe.schedule)
    if step >= first:
        return ""
    return f"the run was extended at step {first}, and its schedule before that is not kept"


def resume(
    recipe: RunRecipe,
    length: Length,
    source: Source,
    engine: Engine[Any],
    saver: Saver,
    records: Telemetry,
    origins: Mapping[str, str],
) -> Resumed:
    """Make the run directory of a run of this `length`, or load its last complete checkpoint into the engine.

    This is a collective. A new run keeps `origins`, the origins of its settings.
    """
    run, steps = Path(recipe.run.dir), length.steps
    extends = check_config(recipe, run)
    # The next start of the run is no extension.
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"extend": False})})
    check_ranks(recipe, run, source)
    passed_over: list[str] = []

    def take(found: Checkpoint) -> None:
        """Continue from a checkpoint. Raises CheckpointError or RunError if it does not belong to this run."""
        if found.state["data"] != source.fingerprint:
            before = "" if moved is None else f", which were at {moved}"
            raise RunError(f"data.path={recipe.data.path} does not hold the images that {run} was started with{before}")
        if extends and found.state["step"] >= steps:
            asked = ", ".join(f"{key}={text(flat(recipe)[key])}" for key in extends)
            most = recipe.schedule.max_steps
            limit = f", by schedule.max_steps={most}" if most == steps and "schedule.max_steps" not in extends else ""
            raise RunError(
                f"{run} is at step {found.state['step']}, and with {asked} it would end at step {steps}{limit}"
            )
        if fault := _before_extension(recipe, found.state["step"]):
            raise CheckpointError(f"{found.path} is of step {found.state['step']}, and {fault}")
        if found.state["step"] > steps:
            raise CheckpointError(f"{found.path} is of step {found.state['step']}, but the run has {steps} steps")
        if "sums" in found.state:
            try:
                read_sums(found.state["sums"])
            except ValueError as error:
                raise CheckpointError(f"{found.path}: {error}") from error
        engine.load(found.path)

    def pass_over(fault: str) -> None:
        passed_over.append(fault)
        records.message(fault)

    # All of this is read before the first collective: later the main rank may already have written the new recipe.
    moved = moved_from(recipe)
    without = newer_keys(run) if (run / "config.yaml").exists() else []
    old = load_run(run, (), None, type(recipe)).schedule if extends else recipe.schedule
    found = checkpoint.use(run, take, pass_over)
    step, sums, name = 0, None, None
    if found is None and (fault := _before_extension(recipe, 0)):
        raise RunError(f"{run} has lost its checkpoints, and cannot start again: {fault}; use a new run.dir")
    if found is not None:
        used, _ = found
        name = used.path.name
        saver.passed_over = {other for other in checkpoint.names(run) if other > name}
        step, sums = int(used.state["step"]), used.state.get("sums")
        records.message(f"resuming {run} at step {step} of {steps}")
    if extends and step:
        last = stages(old, recipe.data.size_hw, total_steps(old, length.steps_per_epoch))[-1]
        if step < last.first:
            raise RunError(
                f"{run} is at step {step}, and schedule.resolution reaches {in_words(last.size_hw)} at step "
                f"{last.first}: it can be extended from there on"
            )
        schedule = extended(old, recipe.schedule, step, length.steps_per_epoch, length.peak)
        recipe = recipe.model_copy(update={"schedule": schedule})
        first, share, before = schedule.extended[-1]
        records.message(
            f"extended: {before}; the learning rate continues from {share:.3g} of its peak at step {first}, "
            f"schedule.shape={schedule.shape} to step {steps}"
        )
    if moved is not None:
        same = ", the same by name and class" if found else ""
        records.message(f"the images are at {recipe.data.path}, and were at {moved}{same}")
    records.rewind(step)
    records.describe(as_yaml(recipe, without), origins)
    records.events.add("resume" if found else "start", ranks=distributed.world_size(), checkpoint=name)
    if extends and step:
        records.events.add("extend", step=step, before=extends, now={key: flat(recipe)[key] for key in extends})
    for fault in passed_over:
        records.events.add("fault", what=fault)
    return Resumed(recipe, step, sums)
