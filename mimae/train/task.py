"""The protocol between the trainer and a task, which defines what a run learns.

To write a task, define its model, its optimizer groups, its inputs and its losses; the other methods have defaults. A
task owns everything that depends on what is learned. The trainer owns the order of samples, resuming, engine,
checkpoints, watchdog, faults and records.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple

import torch
from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.recipe import RunRecipe
from mimae.data.loading.backend import DecoderBackend
from mimae.data.loading.batch import Batch
from mimae.data.loading.examples import Reader
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.engines.base import Engine, M, Obstacles
from mimae.engines.make import make_engine, setup_of
from mimae.model.attention_choice import Call
from mimae.model.units import Model
from mimae.optim.groups import Group
from mimae.optim.resolution import Size
from mimae.plan import flops
from mimae.randomness import Part, initialise
from mimae.telemetry.records import ACCOUNT_KEYS, PHASES
from mimae.train.predictors.base import Options, Predictor
from mimae.weights.open import open_source as open_weights
from mimae.weights.source import Source as Weights
from mimae.weights.start import Fit, fit, place

__all__ = ["Details", "Group", "Result", "Task"]


class Result(NamedTuple):
    """The result of one micro-batch for the trainer."""

    loss: Tensor
    """The loss of this rank, with its autograd graph."""
    shown: dict[str, Tensor]
    """Scalars by column of the records, detached and equal on every rank."""
    latents: Tensor | None = None
    """Latents (B, ..., D) of this rank, detached, for the measures of collapse."""


class Details(NamedTuple):
    """Findings of an evaluation other than its measures."""

    images: int
    """Images that it looked at."""
    left_out: int
    """Images that could not be read, or whose labels could not."""
    measure: str
    """Name of the measure that `classes` has."""
    classes: dict[str, float | None]
    """A measure of each class, by its name; None for a class for which there is nothing to measure."""


class Task(ABC, Generic[M]):
    """A task, which defines what a run learns. Every rank has one."""

    losses: ClassVar[tuple[str, ...]] = ("loss",)
    """Keys of `Result.shown`: columns of metrics.jsonl and, as means, of epochs.jsonl."""
    estimates: ClassVar[tuple[str, ...]] = ()
    """Keys of `Result.shown` that are columns only of epochs.jsonl: losses in other units."""
    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Keys of `Result.shown` that are columns only of epochs.jsonl: diagnostics of the training."""
    gauges: ClassVar[tuple[str, ...]] = ()
    """Keys of `gauge`: columns of metrics.jsonl."""
    measures: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    """Keys of `evaluate`, which are columns of epochs.jsonl, and which value is the best. checkpoint.best names one."""

    def __init__(self, recipe: RunRecipe) -> None:
        self.recipe: RunRecipe = recipe
        self.asked: RunRecipe = recipe
        """The recipe that was requested. A resumed run keeps some settings of its start, so `recipe`, with which it
        continues, may differ from this one."""
        self.origins: Mapping[str, str] = {}
        """The origin of each key's value: a file and line, an override, or a default."""
        self.weights: Weights | None = None
        """The weights from which a new run with model.init starts."""
        self.fit: Fit | None = None
        """The report how these weights fit the model; set when the run has started."""
        self.seen: Callable[[int], None] = lambda count: None
        """Called by `evaluate` with the number of images of each batch."""

    @cached_property
    def source(self) -> Source:
        """The training images."""
        return open_source(self.recipe.data.path, settings=self.recipe.data)

    @cached_property
    def validation(self) -> Source | None:
        """The validation images, or None."""
        path = self.recipe.data.val_path
        return open_source(path, settings=self.recipe.data, use="held-out") if path else None

    @property
    def views(self) -> int:
        """The number of times that a step sees each image of its batch."""
        return 1

    @property
    def peak(self) -> float:
        """The peak learning rate, which records show at factor 1 of the schedule."""
        optimizer = self.recipe.optimizer
        return optimizer.peak(optimizer.learning_rate, self.recipe.schedule.batch_size, self.views)

    def check(self) -> None:
        """Open the data, before the process group is made.

        Raises UserError for data or settings that the task cannot use.
        """
        _ = self.source, self.validation

    def notes(self) -> Iterator[str]:
        """Yield lines about the data, which a run prints when it starts."""
        return iter(())

    def kept(self) -> dict[str, Any]:
        """Return the state of the task that checkpoints keep, as JSON values."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave a checkpoint, so that a trained model can be used without its training images."""

    def obstacles(self, device: torch.device) -> Obstacles:
        """Return the obstacles for the model on this machine."""
        return {}

    # The model and its optimizer

    @abstractmethod
    def outline(self) -> M:
        """Return the model on the meta device: it has shapes and constants, but no weights."""

    def start(self, model: Model, parts: Mapping[str, Part]) -> None:
        """Fill this rank's parts with the start weights of a new run. This is a collective.

        The start weights are the random ones of the seed, replaced by those of model.init where it has them.
        """
        initialise(model, self.recipe.seed, parts)
        if self.weights is not None:
            self.fit = fit(self.weights, model, parts)
            place(self.fit, model, parts)

    def started(self, model: M, device: torch.device) -> None:
        """Measure the start weights of a new run before its first step, and record the result in `fit`.

        The model is in eval mode, without gradients. This is a collective.
        """

    @abstractmethod
    def group(self, name: str, shape: torch.Size) -> Group:
        """Return the optimizer's group of a parameter."""

    def engine(self, device: torch.device) -> Engine[M]:
        """Return the engine of the recipe with the start weights. A process group has to be initialised.

        A run that has checkpoints continues from them, and does not read the source that model.init names.
        """
        if self.recipe.model.init is not None and not checkpoint.names(Path(self.recipe.run.dir)):
            self.weights = open_weights(self.recipe.model.init)
        return make_engine(self.outline(), setup_of(self.recipe), device, self.group, self.start)

    # A step

    def reader(self) -> Reader | None:
        """Return the reader that makes training examples (images with targets) in the loader's processes.

        None stands for images that are cropped, flipped and resized by the settings of `data`.
        """
        return None

    def backend(self) -> DecoderBackend | None:
        """Return what makes the training batches in place of the loader that data.loader names, or None."""
        return None

    def prepare(self, model: M, device: torch.device) -> None:
        """Compute what the steps need of the start's model, before the first one. This is a collective.

        The model is in eval mode, without gradients.
        """

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the inputs of the model's forward, on the device of the batch.

        They are a pure function of the seed and of the batch's epoch, step and sample ids, so that a resumed run is
        equal bit for bit.
        """

    @abstractmethod
    def result(self, output: Any) -> Result:
        """Convert the output of the model's forward. This is a collective if the shown values are summed over ranks."""

    def stepped(self, model: M, shown: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Update the task after an optimizer step, without reading from the device.

        `shown` has the means of `Result.shown` over the micro-batches. `skipped` is 1.0 if the step was skipped.
        """

    def gauge(self, model: M) -> dict[str, float]:
        """Return the values that the record of a step has in addition to the losses."""
        return {}

    # At the end of an epoch. The model is in eval mode, without gradients. Its forwards may be collectives, so all
    # ranks have to call them equally often; `evaluate.share.batches` ensures this.

    def evaluate(self, model: M, device: torch.device) -> dict[str, float]:
        """Return the `measures`, equal on every rank. This is a collective: each rank evaluates its share of images."""
        return {}

    def details(self) -> Details | None:
        """Return what the last call of `evaluate` found beside the measures; None where there is nothing more."""
        return None

    def picture(self, model: M, device: torch.device) -> bytes | None:
        """Return a PNG that shows the model's outputs, on the main rank. This is a collective."""
        return None

    def warning(self, model: M, step: int, steps: int, steps_per_epoch: int) -> str | None:
        """Return a warning at the end of an epoch, after `step` of `steps`, or None."""
        return None

    # After training

    def predictor(self, model: M, options: Options) -> Predictor[Any] | None:
        """Return what `mimae predict` finds in images with a model in eval mode; None for a task that is for nothing
        but pretraining."""
        return None

    def outputs(self) -> Sequence[str]:
        """Return the names of the classes that a fine-tuned model tells apart, in the order of its outputs."""
        return ()

    # What it costs

    def example(self, images: int) -> tuple[Any, ...] | None:
        """Return tensors of the shapes that the model's forward takes for so many images, on the default device; None
        where what it computes depends on their values."""
        return None

    def example_loss(self, model: M) -> Tensor | None:
        """Return a number whose forward and backward cost what a step does for one image; None where nobody knows."""
        example = self.example(1)
        return None if example is None else self.result(model(*example)).loss

    def flops(self, size_hw: Size) -> float | None:
        """Return the FLOPs of a step for one image of (height, width) pixels, or None if they are unknown.

        Only pretraining has images of other sizes than data.image_size.
        """
        return self._flops

    @cached_property
    def _flops(self) -> float | None:
        recipe = self.recipe
        plain = copy.copy(self)
        plain.recipe = recipe.model_copy(update={"model": flops.counted(recipe.model)})
        return flops.trained_flops(plain.outline, plain.example_loss)

    def attention_calls(self) -> Sequence[Call]:
        """Return the calls of attention in the forward of one micro-batch; they decide model.attention=auto."""
        return ()

    def bytes_sent(self, device: torch.device) -> int | None:
        """Return the number of bytes that this rank sends in a step, or None if it is unknown."""
        return None

    def batch_in_words(self) -> str:
        """Return a description of a step's batch for the first lines of a run."""
        return f"{self.recipe.schedule.batch_size} images"

    # Columns of the records

    @property
    def step_keys(self) -> tuple[str, ...]:
        """The columns of metrics.jsonl."""
        return (
            *("step", "epoch", "samples", *self.losses, *self.gauges, "lr", "grad_norm", "image_size"),
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
