"""`mimae convert`: conversion of a run's checkpoint to DeepSpeed's universal format, and back.

    FOLDER/latest_universal                    the name of TAG
    FOLDER/TAG/zero/NAME/                      tensors of a parameter: fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    FOLDER/TAG/zero/optimizer_state.pt         DeepSpeed's state of the optimizer as a whole
    FOLDER/TAG/mp_rank_00_model_states.pt      buffers and counts; also under the name that stage 3 uses
    FOLDER/TAG/average/NAME.pt                 the moving average of the weights, which DeepSpeed ignores

DeepSpeed's `ds_to_universal` makes the same layout from checkpoints of its own engine. One tensor at a time is in
memory, and no pickled code is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimae import distributed
from mimae.checkpoints import checkpoint, dcp
from mimae.checkpoints.saving import Saver
from mimae.config.kept import load_run
from mimae.config.recipe import RunRecipe, TransferRecipe
from mimae.errors import CheckpointError
from mimae.faults.lock import lock
from mimae.model.units import Model
from mimae.optim.schedule import total_steps
from mimae.outside.files import made_beside, write_atomically
from mimae.outside.progress import track
from mimae.train.task import Task
from mimae.train.tasks.registry import make_task

KINDS = {"fp32": "model.", "exp_avg": "optimizer.exp_avg.", "exp_avg_sq": "optimizer.exp_avg_sq."}
"""DeepSpeed's names of a parameter's tensors, and the prefixes of their names in a checkpoint."""

MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")

Adam = Literal["torch", "deepspeed"]
"""Owner of the AdamW that continues: torch's step count is a tensor, DeepSpeed's an int."""

_VERSION = "0.19.8"
"""DeepSpeed version of the format."""


def write(source: Path, folder: Path, adam: Adam = "torch") -> Path:
    """Write FOLDER/TAG from a run's newest usable checkpoint, or from one checkpoint directory; return its path.

    Raises CheckpointError if there is no checkpoint, it has no steps, the format cannot hold the run's optimizer,
    FOLDER is a run or has TAG, or the disk is too full. In these cases no complete TAG is left.
    """
    run, found = checkpoint.locate(source)
    if (folder / "config.yaml").exists():
        raise CheckpointError(f"{folder} is a run directory; give the universal checkpoint a separate folder")
    task = _task(run)
    target = folder / f"global_step{found.state['step']}"
    if target.exists():
        raise CheckpointError(f"{target} exists already")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with made_beside(target) as temporary:
            temporary.mkdir()
            needed, free = sum(file.stat().st_size for file in found.path.iterdir()), shutil.disk_usage(folder).free
            if free < needed:
                raise CheckpointError(f"{target} takes {needed / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} free")
            try:
                _fill(temporary, found, task, adam)
            except (KeyError, CheckpointError) as error:
                raise CheckpointError(
                    f"{found.path} cannot be read as one of {run / 'config.yaml'}: {error}"
                ) from error
            for path in (*temporary.rglob("*"), temporary):
                checkpoint.sync(path)
        checkpoint.sync(folder)
        write_atomically(folder / "latest_universal", target.name)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full.
        raise CheckpointError(f"{target} could not be written: {error}") from error
    return target


def _task(run: Path) -> Task[Any]:
    """Return the task of a run. Raises CheckpointError if DeepSpeed's format cannot hold its optimizer's state."""
    recipe = load_run(run, (), None, RunRecipe)
    if recipe.optimizer.kind != "adamw":
        raise CheckpointError(f"{run} has optimizer.kind={recipe.optimizer.kind}, and the format holds adamw's state")
    if isinstance(recipe, TransferRecipe) and recipe.finetune.freeze != "none":
        raise CheckpointError(
            f"{run} has finetune.freeze={recipe.finetune.freeze}, and the format holds only parameters that are trained"
        )
    return make_task(recipe)


def _fill(target: Path, found: checkpoint.Checkpoint, task: Task[Any], adam: Adam) -> None:
    reader, recipe = dcp.Reader(found.path), task.recipe

    def stored(name: str, shape: tuple[int, ...] = ()) -> Tensor:
        tensor = torch.empty(shape)
        dcp.load(reader, {name: tensor})
        return tensor

    def count(steps: int) -> Tensor | int:
        return torch.tensor(float(steps)) if adam == "torch" else steps

    if kept := found.state.get("task"):
        task.restore(kept)
    model = task.outline()
    taken = 0
    parameters = list(model.named_parameters())
    for name, parameter in track(parameters, "converting", len(parameters), "parameters"):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        for kind, prefix in KINDS.items():
            torch.save({"param": stored(f"{prefix}{name}", parameter.shape), "cat_dim": 0}, folder / f"{kind}.pt")
        taken = int(stored(f"optimizer.step.{name}"))
        torch.save(count(taken), folder / "step.pt")
        if recipe.ema.decay:
            (target / "average").mkdir(exist_ok=True)
            torch.save(stored(f"ema.{name}", parameter.shape), target / "average" / f"{name}.pt")
    # Stages 1 and 2 load as many groups of parameters as there are here; stage 3 gives all groups the settings of the
    # first. Empty groups, as many as there can be, leave each group its settings.
    groups: list[dict[str, Any]] = [{"params": []} for _ in model.named_parameters()]
    whole = {"state": {0: {"step": count(taken)}}, "param_groups": groups}
    optimizer = {"ds_version": _VERSION, "param_groups": groups, "optimizer_state_dict": whole}
    torch.save(optimizer, target / "zero" / "optimizer_state.pt")
    buffers = {name: stored(f"model.{name}", buffer.shape) for name, buffer in _buffers(model).items()}
    states = {
        "module": buffers,
        "buffers": buffers,  # DeepSpeed returns unknown entries to the caller that loads.
        "global_steps": found.state["step"],
        "global_samples": found.state["samples"],
        "skipped_steps": found.state["step"] - taken,
        "ds_version": _VERSION,
        **dict.fromkeys(("dp_world_size", "mp_world_size"), 1),
        **dict.fromkeys(("lr_scheduler", "optimizer")),
    }
    for file in MODEL_STATES:
        torch.save(states, target / file)


def read(folder: Path, run: Path, say: Callable[[str], None] = print) -> Path:
    """Make a checkpoint in RUN, which has a config.yaml, from a universal checkpoint; return its path.

    FOLDER is a universal checkpoint or contains some; then the last one is taken. If it has no average, the average of
    the run begins with the weights, which is reported through `say`. Raises CheckpointError if it does not belong to
    the run's model, is not newer than the checkpoints of RUN, or the disk is too full.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is not a run directory: no config.yaml, which a run of the same recipe has")
    task, root = _task(run), root_of(folder)
    recipe = task.recipe
    if root is None or not (root / "zero").is_dir():
        raise CheckpointError(
            f"{folder} is not a universal checkpoint: it has no zero/, and no latest_universal that names a folder "
            "with one"
        )
    model = task.outline()
    file = next((root / file for file in MODEL_STATES if (root / file).is_file()), root / MODEL_STATES[0])
    states = _read(file)
    try:
        step, skipped = int(states["global_steps"]), int(states["skipped_steps"])
        buffers = {name: states["module"][name].view(buffer.shape) for name, buffer in _buffers(model).items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not of the model in {run / 'config.yaml'}: {error}") from error
    if not 0 <= skipped < step:
        raise CheckpointError(f"{file} has {step} steps, {skipped} of them skipped: there is no step to continue from")
    # DeepSpeed's converter also makes folders for buffers.
    if unknown := {path.name for path in (root / "zero").glob("*") if path.is_dir()} - model.state_dict().keys():
        raise CheckpointError(f"{root} has {min(unknown)}, which the model in {run / 'config.yaml'} lacks")
    has_average = (root / "average").is_dir()
    if recipe.ema.decay and not has_average:
        say(f"{root} has no average of the weights: the run's begins with the weights")
    tensors: dict[str, Tensor] = {f"model.{name}": buffer.float() for name, buffer in buffers.items()}
    parameters = list(model.named_parameters())
    for name, parameter in track(parameters, "converting", len(parameters), "parameters"):
        for kind, prefix in KINDS.items():
            tensors[f"{prefix}{name}"] = _shaped(root / "zero" / name / f"{kind}.pt", parameter.shape)
        tensors[f"optimizer.step.{name}"] = torch.tensor(float(step - skipped))
        if recipe.ema.decay:
            average, weights = root / "average" / f"{name}.pt", tensors[f"model.{name}"]
            tensors[f"ema.{name}"] = _shaped(average, parameter.shape) if has_average else weights
    return _save(run, task, step, tensors)


def _save(run: Path, task: Task[Any], step: int, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint of whole tensors."""
    recipe, source = task.recipe, task.source
    state = {
        "task": task.kept(),
        "samples": step * recipe.schedule.batch_size,
        "steps": total_steps(recipe.schedule, len(source) // recipe.schedule.batch_size),
        "data": source.fingerprint,
    }
    target = checkpoint.finished(checkpoint.unfinished(run, step))
    said: list[str] = []
    with lock(run) as check_owner:
        if newer := [name for name in checkpoint.names(run) if name >= target.name]:
            raise CheckpointError(f"{run} has {newer[0]} already and would continue from there; choose another run")
        distributed.setup()
        try:
            settings = recipe.checkpoint.model_copy(update={"background": False})
            saver = Saver(run, settings, torch.device("cpu"), said.append, check_owner)
            saver.start(step, tensors, state)
            if not saver.finish():
                raise CheckpointError(said[-1])
        finally:
            distributed.shutdown()
    return target


def root_of(folder: Path) -> Path | None:
    """Return the universal checkpoint at `folder`: itself or its last TAG. None if it is neither."""
    latest = folder / "latest_universal"
    if (folder / "zero").is_dir():
        return folder
    return folder / latest.read_text().strip() if latest.is_file() else None


def _buffers(model: Model) -> dict[str, Tensor]:
    """Return the buffers that are part of the state."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _read(file: Path) -> Any:
    """Return what torch saved, with tensors mapped from the file. Raises CheckpointError."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # A broken file can raise anything.
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def _shaped(file: Path, shape: torch.Size) -> Tensor:
    """Return a parameter's tensor, which stage 3 saves flat. Raises CheckpointError."""
    found = _read(file)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file} does not contain a tensor of a parameter")
    if tensor.shape not in (shape, (shape.numel(),)):
        raise CheckpointError(f"{file} has shape {tuple(tensor.shape)}, and the run's model has {tuple(shape)}")
    return tensor.float().view(shape)
