"""The ddp engine: every rank holds the whole model, and DistributedDataParallel averages the gradients."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimae.engines.base import Engine, M, Setup, Start
from mimae.optim.groups import Rule
from mimae.optim.optimizer import Optimizer
from mimae.randomness import materialise, whole_parts

# Every rank computes the state in buffers, such as the gate of the MI terms, itself, and all get the same values. (The
# second name is the argument's name before torch 2.14.)
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


class DDPEngine(Engine[M]):
    """Engine for DDP, see `engines.base.Engine`. A rank's part of a parameter is the whole parameter."""

    spreads = frozenset()

    def _shard(self, setup: Setup, device: torch.device, rule: Rule, start: Start) -> tuple[nn.Module, Optimizer]:
        materialise(self.model, device)
        self.parts = whole_parts(self.model)
        start(self.model, self.parts)
        _fix_strides(self.model)
        module = DistributedDataParallel(
            self.model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
        if device.type == "cpu":
            _settle_buckets(module)
        return module, Optimizer(self._trained(), setup.optimizer, rule, device)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if is_last else self.module.no_sync()


def _fix_strides(model: nn.Module) -> None:
    """Give the gradients of convolutions of one pixel the strides of their weights.

    A dimension of one element may have any stride. For maps whose channels come last, torch may choose other ones than
    DDP's buckets have, and DDP warns of them. The view has the same memory, so this costs and changes nothing.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            weight.register_hook(_contiguous_view)


def _contiguous_view(gradient: Tensor) -> Tensor:
    return gradient.flatten().view(gradient.shape)


def _settle_buckets(module: DistributedDataParallel) -> None:
    """Make DDP lay out its buckets before the first step, by one backward of a sum of all parameters.

    DDP fixes the layout after the first backward of a process. gloo's ring sums an element in an order that depends on
    its place in a bucket, so the layout affects rounding, and a resumed run has to round like an uninterrupted one. The
    layout follows the order in which gradients arrive. Here, as in a step, they arrive from the last parameter to the
    first.
    """
    model = module.module
    forward = model.forward
    model.forward = lambda: torch.stack([p.sum() for p in model.parameters()]).sum()
    module().backward()
    model.forward = forward
    model.zero_grad()
