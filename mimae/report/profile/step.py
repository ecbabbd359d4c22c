"""Training steps of a recipe outside a run, with the parts in the trainer's order, each of them marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import Recipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import make_loader
from mimae.data.loading.to_device import Transfer
from mimae.engines.make import check_machine, setup_of
from mimae.report.profile.marks import BACKWARD, FORWARD, STEP, Mark, mark
from mimae.train import choices
from mimae.train.tasks.pretrain import Pretrain


def task_of(recipe: Recipe, device: torch.device) -> Pretrain:
    """Return the task of a recipe, with `auto` replaced. Raises UserError for unusable data or settings."""
    task = Pretrain(recipe)
    task.check()
    check_machine(setup_of(recipe), device, task.obstacles(device))
    chosen, _ = choices.choose(task, device)
    assert isinstance(chosen, Recipe)
    task.recipe = chosen
    return task


class Steps:
    """The engine of a recipe with its data. Nothing is saved or logged."""

    def __init__(self, task: Pretrain, device: torch.device) -> None:
        self.task, self.recipe, self.device = task, task.recipe, device
        self.engine = task.engine(device)
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
                    with mark("masks"):
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
        )
        for epoch in itertools.count():
            yield from transfer(self.loader.epoch(epoch))

    def close(self) -> None:
        """End the loader's workers."""
        with ExitStack() as ends:
            loader: Any = getattr(self, "loader", None)
            if loader is not None:
                ends.callback(loader.close)
