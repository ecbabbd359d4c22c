"""The trained model of a run of any task, apart from its training images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.kept import load_run
from mimae.config.recipe import RunRecipe
from mimae.model.units import Model, fill
from mimae.train.task import Task
from mimae.train.tasks.registry import make_task
from mimae.transfer.load import use_weights


class Trained(NamedTuple):
    """The model of a run, in eval mode on `device`."""

    task: Task[Any]
    model: Model
    checkpoint: checkpoint.Checkpoint
    device: torch.device

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint."""
        return int(self.checkpoint.state["step"])


def load(
    path: Path,
    average: bool = False,
    overrides: Sequence[str] = (),
    data: str | None = None,
    device: torch.device | None = None,
) -> Trained:
    """Return the model of a run (its newest whole checkpoint) or of one checkpoint. The training images are not needed.

    `average`: with the moving average of its weights. `data`: other images than data.val_path; keys that belong to
    data.val_path are then null, but for those in `overrides`. `device`: by default a GPU where there is one. Raises
    CheckpointError, ConfigError.
    """
    run = checkpoint.run_of(path)
    belongs = [f"{key}=null" for key in load_run(run, (), None, RunRecipe).of_validation] if data else []
    given = {"data": {"val_path": data}} if data else None
    recipe = load_run(run, [*belongs, *overrides], given, RunRecipe)
    # Its weights go anywhere; the backend that trained them may be another machine's.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "sdpa"})})
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = make_task(recipe)

    def read(found: checkpoint.Checkpoint, weights: dict[str, Tensor]) -> Model:
        task.restore(found.state.get("task") or {})
        model: Model = task.outline()
        fill(model, weights, device)
        return model

    found, model = use_weights(path, recipe, average, "the model", read)
    return Trained(task, model.eval(), found, device)
