"""`mimae replay RUN --step S`: one step of a run again, in one process and with diagnostics.

The process takes the global batch in the micro-batches of the run. So all losses equal those of the run up to rounding,
for any number of ranks and any engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimae import distributed
from mimae.checkpoints import checkpoint, contents
from mimae.config.recipe import RunRecipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import make_loader
from mimae.engines.make import check_machine, setup_of
from mimae.errors import UserError
from mimae.optim.resolution import Size, stage_at
from mimae.optim.schedule import schedule_factor, start, total_steps
from mimae.outside.files import Folder
from mimae.outside.progress import track
from mimae.outside.text import say
from mimae.telemetry import pictures, records
from mimae.tools.show import masked
from mimae.train.task import Task
from mimae.train.tasks.pretrain import Pretrain
from mimae.train.tasks.registry import make_task
from mimae.weights.open import open_source

PICTURED = 32
"""Number of samples in the picture: those with the largest L_rec."""

LISTED = 10
"""Largest number of names that are printed of a list."""

HERE = (
    *("engine.kind=ddp", "engine.replicas=1", "engine.offload=none", "engine.offload_path=null"),
    *("optimizer.impl=auto", "compile=off", "data.workers=0", "data.cache=null"),
)
"""Overrides for one process on any machine. Weights depend on them only through rounding."""


class Findings(NamedTuple):
    """Findings of a step. Names are in the order of the model, samples in the order of the batch."""

    losses: dict[str, float]
    grad_norm: float
    weights: list[str]
    """Parameters that are not finite before the step."""
    gradients: list[str]
    """Parameters whose gradient is not finite."""
    module: str | None
    """First module whose output is not finite."""
    rec: dict[int, float]
    """L_rec by sample id, in pretraining."""
    picture: bytes
    """PNG of the inputs: samples, and in pretraining their views."""

    @property
    def is_finite(self) -> bool:
        return not self.gradients and all(map(math.isfinite, (*self.losses.values(), self.grad_norm)))


def replay(recipe: RunRecipe, step: int, say: Callable[[str], None] = say) -> Findings:
    """Run optimizer step `step` (from 1) of the run in recipe.run.dir, from the newest state before it.

    Writes no files. Raises UserError.
    """
    device = distributed.setup()
    try:
        task = make_task(recipe)
        check_machine(setup_of(recipe), device, task.obstacles(device))
        return _Replay(task, device).run(step, say)
    finally:
        distributed.shutdown()


class _Replay:
    """Parts of a run that are needed for a step."""

    def __init__(self, task: Task[Any], device: torch.device) -> None:
        self.task, self.recipe, self.device = task, task.recipe, device
        schedule = self.recipe.schedule
        self.loader = make_loader(
            self.recipe.data,
            task.source,
            seed=self.recipe.seed,
            batch_size=schedule.batch_size,
            accumulate=schedule.accumulate,
            size_at=self._size_at,
            reader=task.reader(),
        )
        self.engine = task.engine(device)
        self.model = self.engine.model

    def run(self, step: int, say: Callable[[str], None]) -> Findings:
        done = self._load(step, say)
        first, _ = start(self.recipe.schedule)
        if done < first:
            raise UserError(
                f"step {done + 1} was taken before the run was extended at step {first}, by a schedule that is not "
                "kept; steps after it can be replayed"
            )
        if done < step - 1:
            between = f"step {done + 1}" if done + 2 == step else f"steps {done + 1} to {step - 1}"
            say(f"running {between} first")
        with closing(self.loader):
            for number in track(range(done + 1, step), "steps before it", step - done - 1, "steps"):
                losses = self._backward(self._batches(number))
                self._step(number, losses)
            batches = self._batches(step)
            weights = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
            with _first_not_finite(self.model) as module:
                losses = self._backward(batches)
            parameters = self.model.named_parameters()
            gradients = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
            rec = {key: value for batch in batches for key, value in self._rec(batch).items()}
            norm = self._step(step, losses)
        for batch in batches:
            for bad in batch.bad:
                say(f"replaced: {bad.path}: {bad.reason}")
        shown = {key: losses[key].item() for key in self.task.losses if key in losses}
        return Findings(shown, norm, weights, gradients, next(iter(module), None), rec, self._picture(batches, rec))

    def _size_at(self, step: int) -> Size:
        """Return the size of the images of a step, counted from 0."""
        schedule, size_hw = self.recipe.schedule, self.recipe.data.size_hw
        return stage_at(schedule, size_hw, total_steps(schedule, self.loader.steps_per_epoch), step).size_hw

    def _load(self, step: int, say: Callable[[str], None]) -> int:
        """Load the newest usable state before a step; return the number of steps before it."""
        for done, path in _states(Path(self.recipe.run.dir), step):
            try:
                found = checkpoint.load(path)
            except checkpoint.CheckpointError as error:
                say(f"{error}; trying the previous one")
                continue
            if found.state["data"] != self.task.source.fingerprint:
                raise UserError(
                    f"data.path={self.recipe.data.path} does not hold the images of the run; on another machine give "
                    "their path: data.path=..."
                )
            try:
                self.engine.load(found.path)
            except checkpoint.CheckpointError as error:
                say(f"{error}; trying the previous one")
                continue
            say(f"from {path}")
            return done
        say("from the initial weights: no state from before this step exists")
        if (init := self.recipe.model.init) is not None and self.task.weights is None:
            self.task.weights = open_source(init)
            self.task.start(self.model, self.engine.parts)
        return 0

    def _batches(self, step: int) -> list[Batch]:
        """Yield the micro-batches of a step."""
        epoch, place = divmod(step - 1, self.loader.steps_per_epoch)
        batches = self.loader.epoch(epoch, place)
        found = []
        for _ in range(self.recipe.schedule.accumulate):
            batch = next(batches).to(self.device)
            # The loader may reuse the batch's memory for the next batch.
            found.append(replace(batch, images=batch.images.clone()))
        return found

    def _backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """The gradients and losses of a step; losses are means over the micro-batches."""
        losses: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            with self.engine.accumulate(is_last=i == len(batches) - 1):
                result = self.task.result(self.engine.forward(*self.task.inputs(batch)))
                self.engine.backward(result.loss / len(batches))
            for key, value in result.shown.items():
                losses[key] = losses.get(key, torch.zeros_like(value)) + value / len(batches)
        return losses

    def _step(self, step: int, losses: dict[str, Tensor]) -> float:
        """Apply the step; return the norm of its gradient."""
        factor = schedule_factor(self.recipe.schedule, step - 1, self.loader.steps_per_epoch, self.task.peak)
        result = self.engine.step(factor)
        self.task.stepped(self.model, losses, result.skipped)
        return result.grad_norm.item()

    @torch.no_grad()
    def _rec(self, batch: Batch) -> dict[int, float]:
        """Return L_rec of each sample, by id; {} where there is no reconstruction."""
        if not isinstance(self.task, Pretrain):
            return {}
        return dict(zip(batch.sample_ids.tolist(), self.task.sample_losses(self.model, batch), strict=True))

    def _picture(self, batches: list[Batch], rec: dict[int, float]) -> bytes:
        worst = sorted(rec, key=lambda sample: rec[sample] if math.isfinite(rec[sample]) else math.inf)[-PICTURED:]
        rows = []
        for batch in batches:
            if not rec:
                rows.append(batch.images[:, None].cpu())
                continue
            chosen = [i for i, sample in enumerate(batch.sample_ids.tolist()) if sample in worst]
            images = batch.images[chosen].cpu()
            visible = self.task.inputs(batch)[1][chosen].cpu()
            rows.append(torch.cat([images[:, None], masked(images, visible, self.recipe.model.patch_size)], dim=1))
        panels = torch.cat(rows)[:PICTURED].unbind(1)
        return pictures.sheet(["sample", *(f"view {i}" for i in range(1, len(panels)))], panels, wide=(1,))


def _states(run: Path, step: int) -> list[tuple[int, Path]]:
    """Yield (steps done, path) of all states of a run from before a step, newest first.

    A state that was kept when steps were skipped is valid for each of them.
    """
    found = []
    for folder in (run, run / "nonfinite"):
        for name in contents.names(folder):
            path, first = folder / "checkpoints" / name, contents.step_of(name)
            try:
                last = contents.read_state(path).get("skipped_to", first)
            except (OSError, checkpoint.CheckpointError):
                continue
            if first < step:
                found.append((min(last, step - 1), path))
    return sorted(found, reverse=True)


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that collects the names of modules whose outputs are not finite, in the order of their returns."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(t.isfinite().all() for t in tensors if isinstance(t, Tensor)):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def report(findings: Findings, logged: dict[str, Any] | None) -> str:
    """Return the findings as text. `logged` is the run's line of metrics.jsonl for this step, if there is one."""
    lines = []
    for key, value in (findings.losses | {"grad_norm": findings.grad_norm}).items():
        then = "" if logged is None else f"   in the run {_number(logged.get(key))}"
        lines.append(f"{key:<10}{_number(value):>12}{then}")
    lines += _names("weights that are not finite before the step", findings.weights)
    lines += [f"first output that is not finite: {findings.module}"] if findings.module else []
    lines += _names("gradients that are not finite", findings.gradients)
    bad = [str(sample) for sample, rec in findings.rec.items() if not math.isfinite(rec)]
    lines += _names(f"samples of {len(findings.rec)} whose L_rec is not finite", bad)
    finite = {sample: rec for sample, rec in findings.rec.items() if math.isfinite(rec)}
    worst = sorted(finite, key=finite.__getitem__, reverse=True)[:LISTED]
    if worst:
        lines.append("largest L_rec, by sample: " + ", ".join(f"{sample}: {finite[sample]:.4g}" for sample in worst))
    lines.append("the step is finite" if findings.is_finite else "the step is not finite")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.7g}"


def _names(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{what}: {len(names)}: {', '.join(names[:LISTED])}{more}"] if names else []


def logged(run: Path, step: int) -> dict[str, Any] | None:
    """Return the run's record of a step."""
    return next((record for record in records.read(Folder(run), "metrics.jsonl") if record["step"] == step), None)
