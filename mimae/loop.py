"""Pretraining, from a recipe to a finished run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mimae import checkpoint, config, diagnostics, distributed, masking, pictures, plan, shortage, telemetry
from mimae.checkpoint import CheckpointSettings
from mimae.config import Recipe
from mimae.data import BadSamples, Batch, Loader, Source, evaluation_batches, fastest, make_loader, open_source
from mimae.data.cache import cache_note
from mimae.data.order import spread_ids
from mimae.data.stalls import Stalls
from mimae.data.transfer import Transfer
from mimae.engines import Engine, check_machine, make_engine
from mimae.exposure import Exposure
from mimae.guards import NonFinite, RunError, Signals
from mimae.kernels import pixel_loss
from mimae.lock import lock
from mimae.model import MIMAE
from mimae.objective import Losses
from mimae.optimizer import StepResult, schedule_factor, total_steps
from mimae.saving import Saver
from mimae.transfer.probe import knn_accuracy, shared_labels
from mimae.watchdog import Watchdog, patience

VALIDATION_IMAGES = 2048
"""Images of data.val_path that the checks during pretraining look at, and as many of the training set."""

PICTURED = 8
"""Images in a reconstruction picture."""

FREE_KEYS = (
    *("run.", "checkpoint.", "telemetry.", "data.workers", "data.cache", "data.val_path", "data.max_bad_fraction"),
    *("engine.", "compile", "model.attention", "optimizer.impl"),
)
"""Settings that may differ when a run is resumed: no weight depends on them (on data.cache and the last four by
rounding alone)."""


class Outcome(NamedTuple):
    """How a call of `pretrain` ended."""

    run: Path
    step: int
    finished: bool
    saved_on_signal: bool


def pretrain(recipe: Recipe) -> Outcome:
    """Runs a recipe to its end, or from its last checkpoint on; every rank of a job calls it.

    Raises UserError for what a person can mend: data, run directory, checkpoints, what this machine cannot do, memory
    that runs out, ten non-finite steps in a row.
    """
    source = open_source(recipe.data.path)
    validation = open_source(recipe.data.val_path) if recipe.data.val_path else None
    if validation is not None and source.labels is not None and validation.labels is not None:
        shared_labels(source, validation)  # classes that do not fit are told now, not at the first check
    limits = recipe.run.first_step_timeout, recipe.run.step_timeout
    device = distributed.setup(patience(*limits))
    try:
        check_machine(recipe, device)
        run = Path(recipe.run.dir)
        with (
            lock(run) as check_owner,
            Signals() as signals,
            Watchdog(run, *limits) as watchdog,
            shortage.explained(recipe, device, watchdog),
        ):
            return _Run(recipe, source, validation, device, check_owner).train(signals, watchdog)
    finally:
        distributed.shutdown()


class _Run:
    """The parts of a run, put together once: data, model, engine, checkpoint, telemetry."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        validation: Source | None,
        device: torch.device,
        check_owner: Callable[[], None],
    ) -> None:
        recipe, self.chosen = _choose_loader(recipe, source)
        self.recipe, self.source, self.validation, self.device = recipe, source, validation, device
        self.check_owner = check_owner
        self.path = Path(recipe.run.dir)
        self.is_main = distributed.rank() == 0
        self.loader: Loader = make_loader(
            recipe.data,
            self.source,
            seed=recipe.seed,
            batch_size=recipe.schedule.batch_size,
            accumulate=recipe.schedule.accumulate,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        self.steps = total_steps(recipe.schedule, self.loader.steps_per_epoch)
        self.views = recipe.schedule.batch_size * recipe.masking.num_masks
        self.engine: Engine = make_engine(recipe, device, self.views)
        self.bad = BadSamples(self.path / "bad_samples.jsonl", len(self.source), recipe.data.max_bad_fraction)
        self.telemetry = telemetry.Telemetry(self.path, recipe.telemetry, is_main=self.is_main, total_steps=self.steps)
        self.phases = telemetry.Phases(device)
        self.exposure = Exposure(device)
        self.transfer = Transfer(device)
        self.stalls = Stalls(recipe.data)
        self.saver = Saver(self.path, recipe.checkpoint, device, self.telemetry.message, check_owner)
        self.step = self._resume()

    def _resume(self) -> int:
        """Makes the run directory, or goes back to its last whole checkpoint; returns the steps done."""
        _check_config(self.recipe, self.path)
        self._agree()
        found = checkpoint.find(self.path, self.telemetry.message)
        if self.is_main:
            try:
                checkpoint.write_atomically(self.path / "config.yaml", config.dump(self.recipe))
                telemetry.environment(self.path / "environment.json")
            except OSError as error:
                raise RunError(f"run.dir={self.path} cannot be written: {error.strerror}") from error
        step = 0
        if found is not None:
            if found.state["data"] != self.source.fingerprint:
                raise RunError(
                    f"data.path={self.recipe.data.path} no longer holds the images that {self.path} was started with"
                )
            self.saver.passed_over = {name for name in checkpoint.names(self.path) if name > found.path.name}
            self.engine.load(found.path)
            step = int(found.state["step"])
            self.telemetry.message(f"resuming {self.path} at step {step} of {self.steps}")
        self.telemetry.rewind(step)
        return step

    def _agree(self) -> None:
        """Ranks that go on from different weights or data would average the gradients of different models."""
        mine = {
            "checkpoints (run.dir)": ", ".join(checkpoint.names(self.path)),
            "data (data.path)": self.source.fingerprint,
            "settings": config.dump(self.recipe),
        }
        for rank, other in enumerate(distributed.gather_objects(mine)):
            for what, value in mine.items():
                if other[what] != value:
                    raise RunError(
                        f"ranks {distributed.rank()} and {rank} differ in {what}: {value[:80]!r} and "
                        f"{other[what][:80]!r}; "
                        "run.dir and data.path have to be the same storage on every node"
                    )

    def train(self, signals: Signals, watchdog: Watchdog) -> Outcome:
        """All that is left of the run."""
        recipe, say = self.recipe, self.telemetry.message
        if self.step >= self.steps:
            say(f"{self.path} is finished: {self.step} of {self.steps} steps")
            return Outcome(self.path, self.step, finished=True, saved_on_signal=False)
        say(self._headline())
        if recipe.data.cache is not None:
            say(cache_note(recipe.data, self.source))
        bytes_sent = plan.bytes_sent(recipe, distributed.world_size(), self.device)
        guard = NonFinite(self.path, self._samples, self._keep)
        per_epoch = self.loader.steps_per_epoch
        step_pace = telemetry.Pace(self.phases, recipe.masking.num_masks)
        epoch_pace = telemetry.Pace(self.phases, recipe.masking.num_masks)
        logged_at = self.step
        stop = due = for_good = False
        with self.telemetry, closing(self.loader), self._saved(watchdog):
            while self.step < self.steps and not stop:
                epoch, first = divmod(self.step, per_epoch)
                watchdog.wait_for(f"step {self.step + 1}, the first of this start or epoch", long=True)
                means = _Means()
                batches = self.transfer(self.loader.epoch(epoch, first))
                measures = dict[str, float]()
                for place in range(first, min(per_epoch, self.steps - epoch * per_epoch)):
                    with self.exposure.measured(place == first + 1):
                        step = self._optimize(batches)
                    self.step += 1
                    means.add(step.losses)
                    guard.check(self.step, step.result.skipped)
                    if self.step % recipe.telemetry.log_every_steps == 0 or self.step in (1, self.steps):
                        images = (self.step - logged_at) * recipe.schedule.batch_size
                        self.telemetry.step(self._record(step) | step_pace.rates(images))
                        self.stalls.read(self.phases.data_seconds, self.transfer.waited)
                        logged_at = self.step
                    last = recipe.run.dry or self.step == self.steps
                    # Before the checkpoint: a kill between the two repeats the line, and loses none.
                    if last or self.step % per_epoch == 0:
                        watchdog.wait_for(f"the end of epoch {epoch}", long=True)
                        images = (self.step - epoch * per_epoch - first) * recipe.schedule.batch_size
                        record: dict[str, Any] = epoch_pace.epoch(images)
                        record |= {"bytes_sent": bytes_sent, "exposed_communication": self.exposure.read()}
                        self.stalls.read(self.phases.data_seconds, self.transfer.waited)
                        measures = self._end_of_epoch(epoch, record, means.read(), step.latents, last)
                        # The checks and pictures of an epoch's end are no training.
                        self.stalls.read(self.phases.data_seconds, self.transfer.waited, counts=False)
                    stop = signals.agreed() or last
                    due, for_good = due or self._is_due(), for_good or self._is_for_good()
                    if stop or due:
                        watchdog.wait_for(f"the checkpoint of step {self.step}", long=True)
                        guard.drain()
                    # Skipped steps are not made up for: a run that they end has to go on from before them.
                    if stop or (due and not guard.streak):
                        self.engine.check_copies()
                        self._save(measures, for_good, stop)
                        due = for_good = False
                    if stop:
                        break
                    watchdog.wait_for(f"step {self.step + 1}", long=not self.saver.is_settled)
        finished = self.step >= self.steps
        if signals.received and not finished:
            say(f"saved at step {self.step} on a signal; the same command goes on from there")
        elif finished:
            say(f"finished: {self.path}")
        return Outcome(self.path, self.step, finished, saved_on_signal=signals.received and not finished)

    @contextmanager
    def _saved(self, watchdog: Watchdog) -> Iterator[None]:
        """However the steps inside end, the save that is under way ends before the run does."""
        try:
            yield
        finally:
            watchdog.wait_for(watchdog.due, long=True)
            self.saver.close()

    def _optimize(self, batches: Iterator[Batch]) -> _Step:
        """One optimizer step over its micro-batches. Reads nothing back."""
        recipe, losses = self.recipe, dict[str, Tensor]()
        for micro in range(recipe.schedule.accumulate):
            with self.phases("data"):
                batch = next(batches)
                self.bad.record(batch.bad)
                self.stalls.made(batch.spent)
            with self.engine.accumulate(is_last=micro == recipe.schedule.accumulate - 1):
                with self.phases("forward"):
                    visible, targets = self._masks(batch, batch.epoch)
                    out = self.engine.forward(batch.images, visible, targets)
                with self.phases("backward"):
                    self.engine.backward(out.loss / recipe.schedule.accumulate)
            for key, value in _reported(out).items():
                share = value / recipe.schedule.accumulate
                losses[key] = losses[key] + share if key in losses else share
        with self.phases("checkpoint"):
            self.saver.settle()
        with self.phases("optimizer"):
            factor = schedule_factor(recipe.schedule, self.step, self.loader.steps_per_epoch)
            result = self.engine.step(factor)
            self.engine.model.objective.gate.update(losses["rec"], result.skipped)
        return _Step(losses, out.latents, result)

    def _record(self, step: _Step) -> dict[str, Any]:
        """What a logged step reads from the device."""
        factor = schedule_factor(self.recipe.schedule, self.step - 1, self.loader.steps_per_epoch)
        return {
            "step": self.step,
            "epoch": self.step / self.loader.steps_per_epoch,
            "samples": self.step * self.recipe.schedule.batch_size,
            **{key: value.item() for key, value in step.losses.items() if key in telemetry.LOSSES},
            "gate": self.engine.model.objective.gate.weight.item(),
            "lr": self.recipe.optimizer.learning_rate * self.views / 256 * factor,
            "grad_norm": step.result.grad_norm.item(),
            "mem_peak_bytes": telemetry.memory(self.device)["mem_peak_bytes"],
        }

    def _samples(self, step: int) -> list[int]:
        """The ids of the global batch of optimizer step `step` (from 1)."""
        epoch, place = divmod(step - 1, self.loader.steps_per_epoch)
        return self.loader.samples(epoch, place).tolist()

    def _epochs_done(self) -> int | None:
        """The number of whole epochs, between two of them."""
        epochs, inside = divmod(self.step, self.loader.steps_per_epoch)
        return None if inside else epochs

    def _is_for_good(self) -> bool:
        """Whether it is time for a checkpoint that stays."""
        epochs, every = self._epochs_done(), self.recipe.checkpoint.every_epochs
        return bool(epochs and every and epochs % every == 0)

    def _is_due(self) -> bool:
        """Whether it is time to save."""
        settings, epochs = self.recipe.checkpoint, self._epochs_done()
        checks = self.recipe.telemetry.probe_every_epochs if settings.best else 0
        has_measures = bool(epochs and checks and epochs % checks == 0)
        return self.step % settings.every_steps == 0 or self._is_for_good() or has_measures

    def _save(self, measures: dict[str, float], for_good: bool, stop: bool) -> None:
        """`measures`: of the epoch that has just ended."""
        state = {
            "samples": self.step * self.recipe.schedule.batch_size,
            "steps": self.steps,
            "data": self.source.fingerprint,
            "for_good": for_good,
            "measures": measures,
        }
        with self.phases("checkpoint"):
            self.saver.start(self.step, self.engine.state(), state)
            if stop and not self.saver.finish():
                raise RunError(
                    f"{self.path} stops at step {self.step} unsaved: make room, and the same command goes on from "
                    "its last checkpoint"
                )

    def _keep(self, first: int, last: int) -> bool:
        """Saves what steps `first` to `last` were taken from, which left it as it was, apart from the checkpoints;
        returns whether it could."""
        self.saver.finish()
        settings = CheckpointSettings(keep=1, background=False)
        keeper = Saver(self.path / "nonfinite", settings, self.device, self.telemetry.message, self.check_owner)
        keeper.start(first - 1, self.engine.state(), {"skipped_to": last, "data": self.source.fingerprint})
        return keeper.finish()

    def _end_of_epoch(
        self, epoch: int, record: dict[str, Any], means: dict[str, float], latents: Tensor, last: bool
    ) -> dict[str, float]:
        """The epoch's line, its picture and its checks, which are returned. Where a forward is a collective every rank
        takes part, on the same images; else the others wait for the main rank at their next collective."""
        recipe, measures = self.recipe, dict[str, float]()
        if not (self.is_main or self.engine.is_spread):
            return measures
        record |= means
        record |= {"epoch": epoch, **telemetry.memory(self.device), **diagnostics.collapse(latents)}
        flops = plan.step_flops(recipe) / recipe.schedule.batch_size * record["images_per_s"]
        peak = plan.peak_flops(plan.device_name(self.device), recipe.precision)
        record["tflops"] = flops / 1e12
        record["mfu"] = flops / (peak * distributed.world_size()) if peak else None
        checks = recipe.telemetry
        if checks.probe_every_epochs and ((epoch + 1) % checks.probe_every_epochs == 0 or last):
            measures = self._validate()
        self.telemetry.epoch(record | measures)
        if warning := self.stalls.verdict():
            self.telemetry.message(warning)
        if checks.images_every_epochs and ((epoch + 1) % checks.images_every_epochs == 0 or last):
            self.telemetry.image(f"images/step-{self.step:08d}.png", self._picture())
        quarter = (self.step - self.loader.steps_per_epoch) * 4 < self.steps <= self.step * 4
        uses_mi = recipe.objective.max_mi > 0 or recipe.objective.min_mi > 0
        if quarter and uses_mi and self.engine.model.objective.gate.weight.item() == 0:
            self.telemetry.message(
                f"the gate is still closed after a quarter of the run: L_rec is not below objective.gate_loss="
                f"{recipe.objective.gate_loss}, so the MI terms train nothing; raise it, or set it to null"
            )
        return measures

    @contextmanager
    def _evaluating(self) -> Iterator[MIMAE]:
        """The model in eval mode, without gradients, and as it was before compiling: that is for the sizes of training,
        and each other one would compile anew."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield self.engine.model.eval()
        self.engine.model.train()

    def _validate(self) -> dict[str, float]:
        """kNN accuracy and reconstruction loss on data.val_path, with the masks of epoch 0."""
        if self.validation is None:
            return {}
        with self._evaluating() as model:
            return self._checks(model, self.validation)

    def _checks(self, model: MIMAE, validation: Source) -> dict[str, float]:
        recipe = self.recipe
        rec, terms = 0.0, 0
        for batch in self._evaluation_batches(validation, VALIDATION_IMAGES):
            visible, targets = self._masks(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                predictions = model.predict(batch.images, visible, targets)
            mean, std = model.encoder.mean, model.encoder.std
            rec += pixel_loss(predictions, batch.images, targets, mean, std, recipe.objective.normalize_pixels).item()
            terms += targets.numel()
        checks = {"val_rec": rec / terms}
        if self.source.labels is not None and validation.labels is not None:
            checks["knn"] = knn_accuracy(model, recipe.data, self.source, validation, limit=VALIDATION_IMAGES)
        return checks

    def _picture(self) -> bytes:
        """Reconstructions of the first images of the validation set, or of the training set."""
        recipe = self.recipe
        batch = next(iter(self._evaluation_batches(self.validation or self.source, PICTURED)))
        visible, targets = self._masks(batch)
        with self._evaluating() as model:
            predictions = model.predict(batch.images, visible, targets)
        return pictures.reconstruction_grid(
            batch.images,
            visible,
            targets,
            predictions,
            patch=recipe.model.patch_size,
            mean=recipe.data.mean,
            std=recipe.data.std,
            normalize=recipe.objective.normalize_pixels,
        )

    def _masks(self, batch: Batch, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """visible (B, N, K) and targets (B, N, M)."""
        recipe, patches = self.recipe, self.engine.model.encoder.num_patches
        visible, hidden = masking.draw(recipe.masking, recipe.seed, epoch, batch.sample_ids, patches)
        return visible, masking.targets(recipe.decoder.predict, visible, hidden)

    def _evaluation_batches(self, source: Source, limit: int) -> Iterator[Batch]:
        """Batches spread evenly over a source, at most `limit` images."""
        ids = spread_ids(len(source), limit)
        for batch in evaluation_batches(self.recipe.data, source, min(64, len(ids)), ids):
            yield batch.to(self.device)

    def _headline(self) -> str:
        recipe = self.recipe
        millions = self.engine.num_parameters / 1e6
        return (
            f"{len(self.source):,} images of {self.source.name}, {self.loader.steps_per_epoch} steps of "
            f"{recipe.schedule.batch_size} x {recipe.masking.num_masks} views an epoch, {self.steps} steps in all; "
            f"each epoch leaves out {len(self.loader.dropped(0))} of the images\n"
            f"{millions:.1f} M parameters on {distributed.world_size()} x {plan.device_name(self.device)}, "
            f"{recipe.precision}; the run is {self.path}\n"
            f"data.loader={recipe.data.loader}, {self.chosen}"
        )


class _Step(NamedTuple):
    """An optimizer step, on the device: means of the losses over its micro-batches, latents of the last of them."""

    losses: dict[str, Tensor]
    latents: Tensor
    result: StepResult


def _reported(losses: Losses) -> dict[str, Tensor]:
    """The losses that are computed, by the keys of the records; all of them global."""
    keys = (*telemetry.LOSSES[1:], "mi_lower_nats", "mi_upper_nats", "saturated")
    found = {"loss": losses.total} | {key: getattr(losses, key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


class _Means:
    """Means of the losses over an epoch, summed on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        self.count += 1
        for key, value in losses.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def read(self) -> dict[str, float]:
        return {key: value.item() / self.count for key, value in self.sums.items()}


def _choose_loader(recipe: Recipe, source: Source) -> tuple[Recipe, str]:
    """The recipe with the name of a loader, and why that one. For "auto" a run keeps what it was started with, or
    takes the fastest one on the main rank's machine."""
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


def _check_config(recipe: Recipe, run: Path) -> None:
    """Refuses to resume a run with settings that would have made other weights."""
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
