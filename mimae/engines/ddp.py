"""The whole model on every rank, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimae.engines.base import Engine
from mimae.optim.optimizer import Optimizer
from mimae.randomness import initialise, materialise, whole_parts

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

# The gate is the only state in buffers, and each rank computes the same one. (The argument's name before torch 2.14.)
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


class DDPEngine(Engine):
    """See `engines.base.Engine`. A rank's part of a parameter is the whole."""

    is_spread = False

    def _shard(self, recipe: Recipe, device: torch.device, views: int) -> tuple[nn.Module, Optimizer]:
        materialise(self.model, device)
        initialise(self.model, recipe.seed)
        self.parts = whole_parts(self.model)
        module = DistributedDataParallel(
            self.model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
        if device.type == "cpu":
            _settle_buckets(module)
        return module, Optimizer(self.parts, recipe.optimizer, views, device)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if is_last else self.module.no_sync()


def _settle_buckets(module: DistributedDataParallel) -> None:
    """Has DDP lay out its buckets before the first step, which it does after a process's first backward: gloo's ring
    sums an element in an order that depends on its place, and a run that is resumed has to round as one that is not.

    The layout is the order in which gradients come; those of these sums come, as a step's, from the last parameter on.
    """
    model = module.module
    forward = model.forward
    model.forward = lambda: torch.stack([p.sum() for p in model.parameters()]).sum()
    module().backward()
    model.forward = forward
    model.zero_grad()
