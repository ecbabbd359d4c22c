"""What the loop knows about sharding, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Protocol

from pydantic import Field
from torch import Tensor

from mimae.model import MIMAE
from mimae.objective import Losses
from mimae.optimizer import StepResult
from mimae.settings import Section


class EngineSettings(Section):
    """How the model is spread over ranks."""

    kind: Literal["ddp"] = Field("ddp", description="ddp: every rank holds the whole model")


class Engine(Protocol):
    """One model on all ranks. A group of one rank takes the same path."""

    model: MIMAE
    """The model itself, for evaluation on this rank alone."""

    def forward(self, images: Tensor, visible: Tensor, targets: Tensor) -> Losses:
        """One micro-batch of this rank, in the run's precision."""

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch: gradients are reduced over ranks with the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the accumulated one."""

    def step(self, factor: float) -> StepResult:
        """Optimizer step at `factor` of the peak learning rates, and the average of weights."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors by section (model, optimizer, ema) and name."""

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `state_dict`."""


def shape_model(model: MIMAE, compile_blocks: bool) -> None:
    """Compiles each transformer block in place; before sharding, after checkpointing (which wraps the call)."""
    if compile_blocks:
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile()
