"""The rules of resuming: which settings may change, and what all ranks have to have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from mimae import distributed
from mimae.checkpoints import checkpoint
from mimae.checkpoints.saving import Saver
from mimae.config import recipe as config
from mimae.config.recipe import Recipe
from mimae.data.loading.backend import fastest
from mimae.data.sources.base import Source
from mimae.engines.base import Engine
from mimae.faults.guards import RunError
from mimae.telemetry import telemetry

FREE_KEYS = (
    *("run.", "checkpoint.", "telemetry.", "data.workers", "data.cache", "data.val_path", "data.max_bad_fraction"),
    *("engine.", "compile", "model.attention", "optimizer.impl"),
)
"""Settings that may differ when a run is resumed: no weight depends on them (on data.cache and the last four by
rounding alone)."""


def choose_loader(recipe: Recipe, source: Source) -> tuple[Recipe, str]:
    """Return the recipe with the name of a loader, and why that one. A collective.

    For "auto" a run keeps what it was started with; a new one takes the fastest on the main rank's machine.
    """
    if recipe.data.loader != "auto":
        return recipe, "as the recipe says"
    said = [("", "")]
    if distributed.rank() == 0:
        known = Path(recipe.run.dir) / "config.yaml"
        if known.exists():
            said = [(config.load(known).recipe.data.loader, "as the run was started")]
        else:
            share = recipe.schedule.batch_size // (recipe.schedule.accumulate * distributed.world_size())
            choice = fastest(recipe.data, source, recipe.seed, max(1, share))
            rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in choice.rates.items())
            failed = "".join(f"; {name} left out: {why}" for name, why in choice.failed.items())
            said = [(choice.loader, f"the fastest here (images/s: {rates}){failed}" if rates else "the only one here")]
    dist.broadcast_object_list(said)
    ((loader, reason),) = said
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"loader": loader})}), reason


def check_config(recipe: Recipe, run: Path) -> None:
    """Raise RunError where a run was started with settings that would have made other weights."""
    if not (run / "config.yaml").exists():
        return
    old = config.flat(config.load(run / "config.yaml").recipe)
    new = config.flat(recipe)
    changed = [
        f"  {key}: {old[key]!r} in the run, {new[key]!r} now"
        for key in new
        if old[key] != new[key] and not key.startswith(FREE_KEYS)
    ]
    if changed:
        raise RunError(
            "\n".join([f"{run} was started with other settings; choose another run.dir or go back:", *changed])
        )


def check_ranks(recipe: Recipe, run: Path, source: Source) -> None:
    """Raise RunError where ranks would go on from different weights or data: they would average the gradients of
    different models. A collective."""
    mine = {
        "checkpoints (run.dir)": ", ".join(checkpoint.names(run)),
        "data (data.path)": source.fingerprint,
        "settings": config.dump(recipe),
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
    recipe: Recipe, steps: int, source: Source, engine: Engine[Any], saver: Saver, records: telemetry.Telemetry
) -> tuple[int, dict[str, Any] | None]:
    """Make the run directory of a run of so many `steps`, or take the engine back to its last whole checkpoint.

    Returns the steps that are done, and the sums of the epoch under way where the checkpoint has them. A collective.
    """
    run = Path(recipe.run.dir)
    check_config(recipe, run)
    check_ranks(recipe, run, source)
    found = checkpoint.find(run, records.message)
    if distributed.rank() == 0:
        try:
            checkpoint.write_atomically(run / "config.yaml", config.dump(recipe))
            telemetry.environment(run / "environment.json")
        except OSError as error:
            raise RunError(f"run.dir={run} cannot be written: {error.strerror}") from error
    step, sums = 0, None
    if found is not None:
        if found.state["data"] != source.fingerprint:
            raise RunError(f"data.path={recipe.data.path} no longer holds the images that {run} was started with")
        saver.passed_over = {name for name in checkpoint.names(run) if name > found.path.name}
        engine.load(found.path)
        step, sums = int(found.state["step"]), found.state.get("sums")
        records.message(f"resuming {run} at step {step} of {steps}")
    records.rewind(step)
    return step, sums
