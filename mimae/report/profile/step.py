"""Training steps of a recipe outside a run, with the parts in the trainer's order, each of them marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import RunRecipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import make_loader
from mimae.data.loading.to_device import Transfer
from mimae.engines.make import check_machine, setup_of
from mimae.report.profile.marks import BACKWARD, FORWARD, STEP, Mark, mark
from mimae.train import choices
from mimae.train.task import Task
from mimae.train.tasks.registry import make_task


def task_of(recipe: RunRecipe, device: torch.device) -> Task[Any]:
    """Return the task of a recipe, with `auto` replaced. Raises UserError for unusable data or settings."""
    task = make_task(recipe)
    task.check()
    check_machine(setup_of(recipe), device, task.obstacles(device))
    task.recipe, _ = choices.choose(task, device)
    return task


class Steps:
    """The engine of a recipe with its data. Nothing is saved or logged."""

    def __init__(self, task: Task[Any], device: torch.device) -> None:
        self.task, self.recipe, self.device = task, task.recipe, device
        self.engine = task.engine(device)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            task.prepare(self.engine.model.eval(), device)
        self.engine.model.train()
        self.batches = self._batches()
        self.losses: dict[str, Tensor] = {}
        """Losses of the last micro-batch."""

    def step(self, mark: Mark = mark) -> None:
        """Take one optimizer step, and wait for the device, so that steps do not overlap in a profile."""
        accumulate = self.recipe.schedule.accumulate
        with mark(STEP):
            for micro in range(accumulate):
                with self.engine.accumulate(micro == accumulate - 1):
                    with mark("data wait"):
                        batch = next(self.batches)
                    with mark("inputs"):
                        inputs = self.task.inputs(batch)
                    with mark(FORWARD):
                        result = self.task.result(self.engine.forward(*inputs))
                    with mark(BACKWARD):
                        self.engine.backward(result.loss / accumulate)
                    self.losses = result.shown
            with mark("optimizer"):
                done = self.engine.step(1e-3)
                self.task.stepped(self.engine.model, self.losses, done.skipped)
            self.wait()

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _batches(self) -> Iterator[Batch]:
        recipe, transfer = self.recipe, Transfer(self.device)
        self.loader = make_loader(
            recipe.data,
            self.task.source,
            seed=recipe.seed,
            batch_size=recipe.schedule.batch_size,
            accumulate=recipe.schedule.accumulate,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            reader=self.task.reader(),
            backend=self.task.backend(),
        )
        for epoch in itertools.count():
            yield from transfer(self.loader.epoch(epoch))

    def close(self) -> None:
        """End the loader's workers."""
        with ExitStack() as ends:
            loader: Any = getattr(self, "loader", None)
            if loader is not None:
                ends.callback(loader.close)
