"""The trainer of any task: from a recipe to a finished run directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from mimae import distributed
from mimae.checkpoints.saving import Saver
from mimae.checkpoints.settings import CheckpointSettings
from mimae.data.loading.batch import BadSamples, Batch
from mimae.data.loading.loader import Loader, make_loader
from mimae.data.loading.to_device import Transfer
from mimae.engines.base import M
from mimae.engines.make import check_machine, setup_of
from mimae.errors import RunError
from mimae.faults import shortage
from mimae.faults.lock import Hold, lock
from mimae.faults.nonfinite import NonFinite
from mimae.faults.signals import Signals
from mimae.faults.watchdog import Watchdog, patience
from mimae.optim.optimizer import StepResult
from mimae.optim.resolution import Stage, in_words, stage_at, stages, work
from mimae.optim.schedule import schedule_factor, total_steps
from mimae.telemetry.telemetry import Telemetry
from mimae.train import choices, resume
from mimae.train.due import Due
from mimae.train.journal import Journal, Step
from mimae.train.run_data import as_kept, changed, not_taken_up
from mimae.train.start import check_process, first_lines
from mimae.train.task import Result, Task
from mimae.weights.open import INIT


class Outcome(NamedTuple):
    """Outcome of a call of `train`."""

    run: Path
    step: int
    finished: bool
    saved_on_signal: bool


def train(task: Task[Any]) -> Outcome:
    """Train a task to the end of its schedule, from its run's last checkpoint on. Every rank of a job calls it.

    Raises UserError for problems that a user can correct: data, run directory, checkpoints, settings that this machine
    cannot run, lack of memory, ten non-finite steps in a row.
    """
    recipe = task.recipe = as_kept(task.recipe)
    check_process(recipe)
    task.check()
    limits = recipe.run.first_step_timeout, recipe.run.step_timeout
    device = distributed.setup(patience(*limits))
    try:
        check_machine(setup_of(recipe), device, task.obstacles(device))
        run = Path(recipe.run.dir)
        with (
            lock(run) as hold,
            Signals() as signals,
            Watchdog(run, *limits) as watchdog,
            shortage.explained(recipe, device, watchdog),
        ):
            return Trainer(task, device, signals, watchdog, hold).train()
    finally:
        distributed.shutdown()


class Trainer(Generic[M]):
    """The trainer of a run. It builds data, engine, checkpoints and records once, and then takes the steps."""

    def __init__(
        self,
        task: Task[M],
        device: torch.device,
        signals: Signals,
        watchdog: Watchdog,
        hold: Hold,
    ) -> None:
        self.task, self.device, self.signals, self.watchdog = task, device, signals, watchdog
        self.hold, self.source = hold, task.source
        recipe, self.choices = choices.choose(task, device)
        self.recipe = task.recipe = recipe
        self.loader: Loader = make_loader(
            recipe.data,
            self.source,
            seed=recipe.seed,
            batch_size=recipe.schedule.batch_size,
            accumulate=recipe.schedule.accumulate,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            reader=task.reader(),
            backend=task.backend(),
            size_at=lambda step: self._stage(step).size_hw,
        )
        self.per_epoch = self.loader.steps_per_epoch
        self.steps = total_steps(recipe.schedule, self.per_epoch)
        self.engine = task.engine(device)
        self.bad = BadSamples(self.path / "bad_samples.jsonl", len(self.source), recipe.data.max_bad_fraction)
        self.telemetry = Telemetry(
            hold.folder,
            recipe.telemetry,
            is_main=distributed.rank() == 0,
            total_steps=self.steps,
            step_keys=task.step_keys,
            epoch_keys=task.epoch_keys,
            losses=task.losses,
            measures=tuple(task.measures),
            work=self._work,
        )
        self.events = self.telemetry.events
        self.transfer = Transfer(device)
        self.saver = self._saver(recipe.checkpoint)
        self.guard = NonFinite(self.path, self._samples, self._keep, self.events.add)
        self.due = Due()
        self.measures: dict[str, float] = {}
        self.batches: Iterator[Batch] | None = None
        """The remaining micro-batches of the epoch; None between two epochs."""
        self.stage: Stage | None = None
        """The stage of schedule.resolution whose images the last step had; None before the first step of this start."""
        if note := not_taken_up(task.asked, recipe):
            self.telemetry.message(note)
        length = resume.Length(self.steps, self.per_epoch, task.peak)
        origins = task.origins and {**task.origins, **changed(task.asked, recipe)}
        resumed = resume.resume(recipe, length, self.source, self.engine, self.saver, self.telemetry, origins)
        self.recipe = task.recipe = resumed.recipe
        self.step = self.first = resumed.step
        self.telemetry.begin(self.step)
        if task.fit is not None:
            with self._evaluating() as model:
                task.started(model, device)
            self.telemetry.message("\n".join(task.fit.lines()))
            self.telemetry.keep(INIT, json.dumps(task.fit.record(), indent=1) + "\n")
        self.journal = Journal(
            task,
            self.telemetry,
            self.transfer,
            device,
            step=self.step,
            steps=self.steps,
            per_epoch=self.per_epoch,
            sums=resumed.sums,
        )
        self.phases = self.journal.phases

    def train(self) -> Outcome:
        """Take the remaining steps of the run."""
        if self.step >= self.steps:
            self.telemetry.message(f"{self.path} is finished: {self.step} of {self.steps} steps")
            return Outcome(self.path, self.step, finished=True, saved_on_signal=False)
        parameters = self.engine.num_parameters
        for line in first_lines(self.task, self.loader, parameters, self.steps, self.choices, self.device, self.path):
            self.telemetry.message(line)
        with self.telemetry, closing(self.loader), self._saved():
            self.watchdog.wait_for("the preparation of the first step", long=True)
            with self._evaluating() as model:
                self.task.prepare(model, self.device)
            while not self.due.stop:
                self.begin_step()
                with self.journal.exposure.measured(self._is_sampled):
                    step = self.optimize()
                self.step_done(step)
                self.epoch_done(step)
                self.save()
        return self._outcome()

    def optimize(self) -> Step:
        """Take one optimizer step over its micro-batches, without reading from the device."""
        losses: dict[str, Tensor] = {}
        for is_last in self._micro_batches():
            with self.engine.accumulate(is_last):
                batch = self.take()
                result = self.forward(batch)
                self.backward(result)
            self._add(losses, result.shown)
        factor = schedule_factor(self.recipe.schedule, self.step, self.per_epoch, self.task.peak)
        return Step(losses, result.latents, factor, self.update(losses, factor))

    # The parts of a step

    def begin_step(self) -> None:
        """Begin an epoch if none is in progress, and set `first` to the step from which it continues."""
        is_new = self._enter_stage()
        if self.batches is not None:
            self.watchdog.wait_for(f"step {self.step + 1}", long=is_new or not self.saver.is_settled)
            return
        self.watchdog.wait_for(f"step {self.step + 1}, the first of this start or epoch", long=True)
        self.first = self.step
        self.batches = self.transfer(self.loader.epoch(*divmod(self.step, self.per_epoch)))

    def _stage(self, step: int) -> Stage:
        """Return the stage of schedule.resolution that a step is in, counted from 0."""
        return stage_at(self.recipe.schedule, self.recipe.data.size_hw, self.steps, step)

    def _work(self, step: int) -> float:
        """Return the FLOPs of the first `step` steps for one image each, or their number if FLOPs are not known."""
        found = stages(self.recipe.schedule, self.recipe.data.size_hw, self.steps)
        return work(found, step, lambda size_hw: self.task.flops(size_hw) or 1.0) if len(found) > 1 else step

    def _enter_stage(self) -> bool:
        """Tell the size of the images at the first step of a start or stage, if they grow (schedule.resolution).

        Return whether the next step is such a step: its blocks may have to be compiled.
        """
        stage, before = self._stage(self.step), self.stage
        self.stage = stage
        if not self.recipe.schedule.resolution or stage == before:
            return False
        self.telemetry.message(f"from step {self.step + 1} to {stage.end}: images of {in_words(stage.size_hw)}")
        self.events.add("resolution", step=self.step, size=stage.size_hw, until=stage.end)
        return True

    def take(self) -> Batch:
        """Wait for the next micro-batch."""
        assert self.batches is not None
        with self.phases("data"):
            with self.signals.waiting_for("the next batch"):
                batch = next(self.batches)
            self.bad.record(batch.bad)
            self.journal.taken(batch)
        return batch

    def forward(self, batch: Batch) -> Result:
        """Compute the losses of a micro-batch."""
        with self.phases("forward"):
            return self.task.result(self.engine.forward(*self.task.inputs(batch)))

    def backward(self, result: Result) -> None:
        """Add the gradient of a micro-batch."""
        with self.phases("backward"):
            self.engine.backward(result.loss / self.recipe.schedule.accumulate)

    def update(self, losses: Mapping[str, Tensor], factor: float) -> StepResult:
        """Step the optimizer. `losses` are means over the micro-batches, `factor` is that of the learning rate."""
        with self.phases("checkpoint"):
            self.saver.settle()
        with self.phases("optimizer"):
            result = self.engine.step(factor)
            self.task.stepped(self.engine.model, losses, result.skipped)
        return result

    def _micro_batches(self) -> Iterator[bool]:
        """Yield, for each micro-batch of a step, True if it is the last one."""
        count = self.recipe.schedule.accumulate
        return (micro == count - 1 for micro in range(count))

    def _add(self, losses: dict[str, Tensor], shown: Mapping[str, Tensor]) -> None:
        """Add the values of a micro-batch to the means of its step."""
        for key, value in shown.items():
            share = value / self.recipe.schedule.accumulate
            losses[key] = losses[key] + share if key in losses else share

    # After the step

    def step_done(self, step: Step) -> None:
        """Count a step, check that it was finite, and log it if it is due."""
        self.step += 1
        self.guard.check(self.step, step.result.skipped)
        self.journal.step(self.step, step, self.engine.model)

    def epoch_done(self, step: Step) -> None:
        """Evaluate, write the epoch's record and draw the picture, at the end of an epoch or of the run.

        This comes before the checkpoint: if the process is killed between the two, the record is written again, not
        lost.
        """
        if not (self._is_last or self.step % self.per_epoch == 0):
            return
        checks = self.recipe.telemetry
        self.watchdog.wait_for(f"the end of epoch {(self.step - 1) // self.per_epoch}", long=True)
        record = self.journal.epoch(self.step, step)
        with self._evaluating() as model:
            self.measures = self.task.evaluate(model, self.device) if self._is_time(checks.probe_every_epochs) else {}
            self.telemetry.epoch(record | self.measures)
            if self._is_time(checks.images_every_epochs) and (png := self.task.picture(model, self.device)):
                self.telemetry.image(f"images/step-{self.step:08d}.png", png)
        warning = self.task.warning(self.engine.model, self.step, self.steps, self.per_epoch)
        self.journal.close_epoch(self.step, warning)
        if self.step % self.per_epoch == 0:
            self.batches = None

    def save(self) -> None:
        """Save a checkpoint if one is due, and before the run stops."""
        settings, checks = self.recipe.checkpoint, self.recipe.telemetry.probe_every_epochs
        stop = self.signals.agreed() or self._is_last
        if stop and not self._is_last:
            self.events.add("signal", step=self.step)
        self.due = self.due.after(self.step, self.per_epoch, settings, checks, stop)
        if not (self.due.save or self.due.stop):
            return
        self.watchdog.wait_for(f"the checkpoint of step {self.step}", long=True)
        self.guard.drain()
        # Skipped steps are not repeated. If they end the run, it has to resume from a step before them.
        if self.guard.streak and not self.due.stop:
            return
        self.engine.check_copies()
        with self.phases("checkpoint"):
            self.saver.start(self.step, self.engine.state(), self._state())
            if self.due.stop and not self.saver.finish():
                raise RunError(
                    f"{self.path} stops at step {self.step} without saving it: free some disk space, then the same "
                    "command continues from its last checkpoint"
                )
        self.due = Due(stop=self.due.stop)

    @property
    def _is_sampled(self) -> bool:
        """True if the next step is profiled: three steps of an epoch, but not the first one of a start or epoch."""
        return self.step - self.first in {1, self.per_epoch // 3, 2 * self.per_epoch // 3} - {0}

    @property
    def _is_last(self) -> bool:
        """True if this step is the last one of the run or of a dry run."""
        return self.recipe.run.dry or self.step >= self.steps

    def _is_time(self, every: int) -> bool:
        """Return True if an action is due that happens every `every` epochs (0: never) and at the end of the run."""
        return bool(every) and (-(-self.step // self.per_epoch) % every == 0 or self._is_last)

    @contextmanager
    def _evaluating(self) -> Iterator[M]:
        """Yield the model in eval mode, without gradients and without the compiled code.

        The compiled code is for the sizes of training. Every other size would cause a recompilation.
        """
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield self.engine.model.eval()
        self.engine.model.train()

    # The run

    @property
    def path(self) -> Path:
        """The run directory. A user may rename it while the run is in progress."""
        return self.hold.folder.path

    def _saver(self, settings: CheckpointSettings, inside: str = "") -> Saver:
        say, note = self.telemetry.message, self.events.add
        return Saver(self.path, settings, self.device, say, self.hold, inside, note)

    def _state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps in addition to the tensors."""
        return {
            "samples": self.step * self.recipe.schedule.batch_size,
            "steps": self.steps,
            "data": self.source.fingerprint,
            "for_good": self.due.for_good,
            "measures": self.measures if self.step % self.per_epoch == 0 or self._is_last else {},
            "better": dict(self.task.measures),
            "task": self.task.kept(),
            "sums": self.journal.sums.state(),
        }

    def _samples(self, step: int) -> list[int]:
        """Return the ids of the global batch of optimizer step `step` (from 1)."""
        return self.loader.samples(*divmod(step - 1, self.per_epoch)).tolist()

    def _keep(self, first: int, last: int) -> bool:
        """Save the weights for `mimae replay`, separately from the checkpoints, and return True on success.

        All steps from `first` to `last` were skipped, so the weights did not change in between.
        """
        self.saver.finish()
        settings = CheckpointSettings(keep=1, background=False)
        keeper = self._saver(settings, "nonfinite")
        keeper.start(first - 1, self.engine.state(), {"skipped_to": last, "data": self.source.fingerprint})
        return keeper.finish()

    @contextmanager
    def _saved(self) -> Iterator[None]:
        """Finish the save that is in progress before the run ends, also if the steps end with an exception."""
        try:
            yield
        finally:
            self.watchdog.wait_for(self.watchdog.due, long=True)
            self.saver.close()

    def _outcome(self) -> Outcome:
        """Print how the run ended, and return its outcome."""
        finished = self.step >= self.steps
        if finished:
            self.events.add("finish", step=self.step)
        on_signal = self.signals.received and not finished
        if on_signal:
            self.telemetry.message(f"saved at step {self.step} on a signal; the same command continues from there")
        elif finished:
            self.telemetry.message(f"finished: {self.path}")
        return Outcome(self.path, self.step, finished, saved_on_signal=on_signal)
