"""The whole model on every rank, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mimae import distributed
from mimae.engines.base import Compile, shape_model
from mimae.model import MIMAE
from mimae.objective import Losses
from mimae.optimizer import EMASettings, Optimizer, OptimizerSettings, StepResult

# The gate is the only state in buffers, and each rank computes the same one. (The argument's name before torch 2.14.)
_NO_BUFFER_SYNC: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


class DDPEngine:
    """See `engines.base.Engine`. Needs an initialised process group, of one rank too."""

    def __init__(
        self,
        model: MIMAE,
        optimizer: OptimizerSettings,
        ema: EMASettings,
        *,
        views: int,
        precision: str,
        compile: Compile,
    ) -> None:
        """`model` lies on its device; `views`: images x masks of the global batch; `precision`: fp32 or bf16."""
        shape_model(model, compile)
        self.model = model
        device = model.encoder.mean.device
        self.module = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
        if device.type == "cpu":
            self.module.register_comm_hook(None, distributed.timed_all_reduce)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = Optimizer(model, optimizer, views)
        self.ema_decay = ema.decay
        self.parameters = dict(model.named_parameters())
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if ema.decay else {}

    def forward(self, images: Tensor, visible: Tensor, targets: Tensor) -> Losses:
        with self.autocast:
            return self.module(images, visible, targets)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> StepResult:
        result = self.optimizer.step(factor)
        if self.ema_decay is not None:
            averages = list(self.ema.values())
            with torch.no_grad():
                moves = torch._foreach_sub(list(self.parameters.values()), averages)
                torch._foreach_mul_(moves, (1 - self.ema_decay) * (1 - result.skipped))
                torch._foreach_add_(averages, moves)
        return result

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**state, "ema": self.ema} if self.ema else state

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, average in self.ema.items():
            average.copy_(state["ema"][name])
