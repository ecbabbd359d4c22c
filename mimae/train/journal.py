"""The book-keeping of a run: it measures the training steps, and writes the records and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from mimae import distributed
from mimae.data.loading.batch import Batch
from mimae.data.loading.stalls import WORTH, WORTH_AT_END, Stalls
from mimae.data.loading.to_device import Transfer
from mimae.data.sources.cache import Fullness
from mimae.engines.base import M
from mimae.optim.optimizer import StepResult
from mimae.optim.resolution import Size, stage_at
from mimae.plan.gpus import device_name, peak_flops
from mimae.telemetry import accounts, collapse
from mimae.telemetry.clock import Pace, Phases
from mimae.telemetry.cores import CoreReadings
from mimae.telemetry.exposure import Exposure
from mimae.telemetry.memory import memory
from mimae.telemetry.nvml import GPUReadings
from mimae.telemetry.records import OVER_RANKS
from mimae.telemetry.telemetry import Telemetry
from mimae.train.epoch import EpochSums
from mimae.train.task import Task


class Step(NamedTuple):
    """The results of an optimizer step, on the device."""

    losses: dict[str, Tensor]
    """Means over the micro-batches."""
    latents: Tensor | None
    """Latents of the last micro-batch."""
    factor: float
    """Factor of the learning rate."""
    result: StepResult


class Journal(Generic[M]):
    """The measurements of the steps since the start, and of the current epoch.

    Every rank has one, because the record of an epoch covers all ranks. Only the main rank writes records.
    """

    def __init__(
        self,
        task: Task[M],
        telemetry: Telemetry,
        transfer: Transfer,
        device: torch.device,
        *,
        step: int,
        steps: int,
        per_epoch: int,
        sums: Mapping[str, Any] | None,
    ) -> None:
        """Start the clocks at `step` of `steps`. `sums` are the sums of the current epoch from a checkpoint."""
        self.task, self.telemetry, self.transfer, self.device = task, telemetry, transfer, device
        self.steps, self.per_epoch, self.logged_at = steps, per_epoch, step
        self.phases = Phases(device)
        self.exposure = Exposure(device)
        self.stalls, self.cache = Stalls(task.recipe.data), Fullness(task.recipe.data, task.source)
        self.gpu, self.cores, self.stragglers = GPUReadings(device), CoreReadings(), accounts.Stragglers()
        self.bytes_sent = task.bytes_sent(device)
        self.warnings: list[dict[str, Any]] = []
        """Details of the events, with the text in `what`."""
        self.pace = Pace(self.phases, task.views)
        self.sums = EpochSums(self.phases, task.views)
        if sums is not None:
            self.sums.load(sums, device)

    def taken(self, batch: Batch) -> None:
        """Count the seconds in which the loader made a micro-batch."""
        self.stalls.made(batch.spent)

    def step(self, number: int, step: Step, model: M) -> None:
        """Count a step, and write its record if one is due; values are read from the device only then."""
        batch_size = self.task.recipe.schedule.batch_size
        self.sums.add(step.losses, batch_size)
        if number % self.task.recipe.telemetry.log_every_steps == 0 or number in (1, self.steps):
            record = {
                "step": number,
                "epoch": number / self.per_epoch,
                "samples": number * batch_size,
                **{key: value.item() for key, value in step.losses.items() if key in self.task.losses},
                **self.task.gauge(model),
                "lr": self.task.peak * step.factor,
                "grad_norm": step.result.grad_norm.item(),
                "image_size": self._size(number - 1)[0],
                "mem_peak_bytes": memory(self.device)["mem_peak_bytes"],
            }
            self.telemetry.step(record | self.pace.rates((number - self.logged_at) * batch_size))
            self.gpu.read()
            self._read_stalls()
            self.logged_at = number

    def epoch(self, number: int, step: Step) -> dict[str, Any]:
        """Return the columns of the epoch that ends with this step, and note its warnings. This is a collective."""
        record = {"epoch": (number - 1) // self.per_epoch, "step": number} | self.sums.record() | memory(self.device)
        record |= {"bytes_sent": self.bytes_sent, "exposed_communication": self.exposure.read()}
        record |= self._flops(number, record["images_per_s"])
        own = {name: record.get(name) for name in ("seconds", *OVER_RANKS)}
        own |= {"workers_bytes": accounts.workers_bytes(), **self.gpu.take(), **self.cores.take()}
        everyone = distributed.gather_objects(own)
        record |= accounts.over_ranks(everyone)
        self._read_stalls()
        if step.latents is not None and distributed.rank() == 0:
            record |= collapse.collapse(step.latents)
        waits = self.stalls.verdict(WORTH_AT_END if number == self.steps else WORTH)
        self.warnings += [] if waits is None else [waits._asdict()]
        self.warnings += [{"what": w} for w in (self.stragglers.verdict(everyone), self.cache.verdict()) if w]
        return record

    def close_epoch(self, number: int, warning: str | None) -> None:
        """Write the warnings, the task's own one last, and begin the next epoch if this one is complete."""
        for details in (*self.warnings, *([{"what": warning}] if warning else [])):
            self.telemetry.message(details["what"])
            self.telemetry.events.add("warning", step=number, **details)
        self.warnings.clear()
        # Evaluation and picture do not count as training time.
        self._read_stalls(counts=False)
        if number % self.per_epoch == 0:
            self.sums.clear()

    def _size(self, step: int) -> Size:
        """Return height and width of the images of a step, counted from 0."""
        recipe = self.task.recipe
        return stage_at(recipe.schedule, recipe.data.size_hw, self.steps, step).size_hw

    def _flops(self, number: int, images_per_s: float) -> dict[str, float | None]:
        """Return the rate of an epoch's steps up to `number`, each with the FLOPs of its own size of images."""
        first = (number - 1) // self.per_epoch * self.per_epoch
        counts = Counter(self._size(step) for step in range(first, number))
        of_sizes = [(self.task.flops(size_hw), count) for size_hw, count in counts.items()]
        if any(flops is None for flops, _ in of_sizes):
            return {}
        peak = peak_flops(device_name(self.device), self.task.recipe.precision)
        flops = images_per_s * sum((flops or 0.0) * count for flops, count in of_sizes) / counts.total()
        return {"tflops": flops / 1e12, "mfu": flops / (peak * distributed.world_size()) if peak else None}

    def _read_stalls(self, counts: bool = True) -> None:
        self.stalls.read(self.phases.data_seconds, self.transfer.waited, counts=counts)
