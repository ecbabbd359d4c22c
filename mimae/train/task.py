"""The protocol between the trainer and what a run learns.

To write a task, give its model, its optimizer groups, its inputs and its losses; the rest has defaults. A task owns all
that depends on what is learned. The trainer owns order, resuming, engine, checkpoints, watchdog, faults and records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple

import torch
from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.recipe import RunRecipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.examples import Reader
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.engines.base import Engine, M, Obstacles
from mimae.engines.make import make_engine, setup_of
from mimae.model.attention_choice import Call
from mimae.model.units import Model
from mimae.optim.groups import Group
from mimae.randomness import Part, initialise
from mimae.telemetry.records import ACCOUNT_KEYS, PHASES
from mimae.weights.open import open_source as open_weights
from mimae.weights.source import Source as Weights
from mimae.weights.start import Fit, fit, place

__all__ = ["Group", "Result", "Task"]


class Result(NamedTuple):
    """Result of one micro-batch, as the trainer reads it."""

    loss: Tensor
    """The local loss, which carries the graph."""
    shown: dict[str, Tensor]
    """Scalars by column of the records, detached and equal on every rank."""
    latents: Tensor | None = None
    """(B, ..., D) of this rank, detached, for the signs of collapse."""


class Task(ABC, Generic[M]):
    """A task: what a run learns. Every rank has one."""

    losses: ClassVar[tuple[str, ...]] = ("loss",)
    """Keys of `Result.shown`: columns of metrics.jsonl and, as means, of epochs.jsonl."""
    estimates: ClassVar[tuple[str, ...]] = ()
    """Keys of `Result.shown` that are columns of epochs.jsonl alone: losses in other units."""
    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Keys of `Result.shown` that are columns of epochs.jsonl alone: signs of health."""
    gauges: ClassVar[tuple[str, ...]] = ()
    """Keys of `gauge`: columns of metrics.jsonl."""
    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    """Keys of `evaluate`, columns of epochs.jsonl, and which value is the best: checkpoint.best may name each."""

    def __init__(self, recipe: RunRecipe) -> None:
        self.recipe: RunRecipe = recipe
        self.asked: RunRecipe = recipe
        """Recipe that was asked for. A run keeps some of what it was started with, so `recipe`, with which it
        continues, may be another one once training begins."""
        self.origins: Mapping[str, str] = {}
        """Where the value of each key was set: a file and line, an override, or nowhere."""
        self.weights: Weights | None = None
        """Weights that a new run with model.init starts from."""
        self.fit: Fit | None = None
        """How that fits the model, once it started."""

    @cached_property
    def source(self) -> Source:
        """The images that are trained on."""
        return open_source(self.recipe.data.path, settings=self.recipe.data)

    @cached_property
    def validation(self) -> Source | None:
        """The images that are evaluated on."""
        path = self.recipe.data.val_path
        return open_source(path, settings=self.recipe.data, use="held-out") if path else None

    @property
    def views(self) -> int:
        """Number of times that a step sees each image of its batch."""
        return 1

    @property
    def peak(self) -> float:
        """The learning rate that records show at factor 1 of the schedule."""
        optimizer = self.recipe.optimizer
        return optimizer.peak(optimizer.learning_rate, self.recipe.schedule.batch_size, self.views)

    def check(self) -> None:
        """Open the data. Raises UserError for data or settings that the task cannot use, before the ranks meet."""
        _ = self.source, self.validation

    def notes(self) -> Iterator[str]:
        """Yield what the first lines of a run say of its data."""
        return iter(())

    def kept(self) -> dict[str, Any]:
        """Return what checkpoints keep of the task, as JSON has it."""
        return {}

    def obstacles(self, device: torch.device) -> Obstacles:
        """Return what stands against the model on this machine."""
        return {}

    # The model and its optimizer

    @abstractmethod
    def outline(self) -> M:
        """Return the model on the meta device: shapes and constants, no weights."""

    def start(self, model: Model, parts: Mapping[str, Part]) -> None:
        """Fill this rank's parts with the weights that a new run starts with: those of the seed, and over them those of
        model.init. A collective."""
        initialise(model, self.recipe.seed, parts)
        if self.weights is not None:
            self.fit = fit(self.weights, model, parts)
            place(self.fit, model, parts)

    def started(self, model: M, device: torch.device) -> None:
        """Look at what a new run has started from, and note it in `fit`, before the first step. The model is in eval
        mode, without gradients. A collective."""

    @abstractmethod
    def group(self, name: str, shape: torch.Size) -> Group:
        """Return the optimizer's group of a parameter."""

    def engine(self, device: torch.device) -> Engine[M]:
        """Return the engine of the recipe with the start weights. Needs an initialised process group.

        A run that has checkpoints goes on from them, and does not need what model.init names any more.
        """
        if self.recipe.model.init is not None and not checkpoint.names(Path(self.recipe.run.dir)):
            self.weights = open_weights(self.recipe.model.init)
        return make_engine(self.outline(), setup_of(self.recipe), device, self.group, self.start)

    # A step

    def reader(self) -> Reader | None:
        """Return what makes the examples of training in the loader's processes: images with targets; None: images that
        are cropped, flipped and resized as the settings of data say."""
        return None

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what the model's forward takes, on the device of the batch: a pure function of the seed and of the
        batch's epoch, step and sample ids, so that a run which is resumed goes on with equal bits."""

    @abstractmethod
    def result(self, output: Any) -> Result:
        """Read the output of the model's forward. A collective, where what is shown is summed over ranks."""

    def stepped(self, model: M, shown: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Follow an optimizer step, with the means of what was shown over its micro-batches; `skipped`: 1.0 where the
        step was left out. Reads nothing from the device."""

    def gauge(self, model: M) -> dict[str, float]:
        """Return what a logged step shows beside its losses."""
        return {}

    # At the end of an epoch. The model is in eval mode, without gradients. Its forwards may be collectives, so
    # each rank has to make as many of them as the others: with `evaluate.share.batches` it does.

    def evaluate(self, model: M, device: torch.device) -> dict[str, float]:
        """Return the `measures`, equal on every rank. A collective: each rank takes its share of the images."""
        return {}

    def picture(self, model: M, device: torch.device) -> bytes | None:
        """Return a PNG of what the model does, on the main rank. A collective."""
        return None

    def warning(self, model: M, step: int, steps: int, steps_per_epoch: int) -> str | None:
        """Return what a person should hear at the end of an epoch, after `step` of `steps`."""
        return None

    # What it costs

    def flops(self) -> float | None:
        """Return the FLOPs that a step takes for one image."""
        return None

    def attention_calls(self) -> Sequence[Call]:
        """Return the calls of attention in a forward of one micro-batch, on which model.attention=auto is decided."""
        return ()

    def bytes_sent(self, device: torch.device) -> int | None:
        """Return the bytes that this rank sends in a step."""
        return None

    def batch_in_words(self) -> str:
        """Return what a step sees, for the first lines of a run."""
        return f"{self.recipe.schedule.batch_size} images"

    # Columns of the records

    @property
    def step_keys(self) -> tuple[str, ...]:
        """The columns of metrics.jsonl."""
        return (
            *("step", "epoch", "samples", *self.losses, *self.gauges, "lr", "grad_norm"),
            *("images_per_s", "views_per_s", "data_wait", "mem_peak_bytes"),
        )

    @property
    def epoch_keys(self) -> tuple[str, ...]:
        """The columns of epochs.jsonl."""
        return (
            *("epoch", "step", "images", "seconds", "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes"),
            *("mem_reserved_bytes", "bytes_sent", "exposed_communication", "tflops", "mfu"),
            *(*self.estimates, *self.losses, *(f"seconds_{phase}" for phase in PHASES)),
            *("deviation", "effective_rank", "alignment", "uniformity", *self.diagnostics, *self.measures),
            *ACCOUNT_KEYS,
        )
