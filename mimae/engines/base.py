"""What the loop knows about sharding, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from mimae.adamw import IMPLEMENTATIONS
from mimae.errors import UserError
from mimae.model import MIMAE, attention
from mimae.objective import Losses
from mimae.optimizer import StepResult
from mimae.settings import Section

if TYPE_CHECKING:
    from mimae.config import Recipe

Compile = Literal["auto", "on", "graphs", "off"]
"""torch.compile of each block, `graphs` with CUDA graphs; auto: on with CUDA."""


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


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Raises UserError for what a recipe asks by name and this machine cannot do."""
    model, decoder = recipe.model, recipe.decoder
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    heads = {model.width // model.heads, decoder.width // decoder.heads}
    graphs = recipe.compile == "graphs" and device.type != "cuda"
    obstacles = {
        f"model.attention={model.attention}": attention.obstacle(model.attention, device, dtype, heads),
        f"optimizer.impl={recipe.optimizer.impl}": IMPLEMENTATIONS[recipe.optimizer.impl].obstacle(device),
        f"compile={recipe.compile}": "CUDA graphs need a CUDA device" if graphs else None,
    }
    told = [f"{key} cannot run on this {device.type}: {reason}" for key, reason in obstacles.items() if reason]
    if told:
        raise UserError("\n".join([*told, "auto runs everywhere"]))


def compiles(setting: Compile, device: torch.device) -> bool:
    """Whether the setting `compile` compiles blocks on a device."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")


def shape_model(model: MIMAE, setting: Compile) -> None:
    """Compiles each transformer block in place; before sharding, after checkpointing (which wraps the call)."""
    if not compiles(setting, model.encoder.mean.device):
        return
    mode = "reduce-overhead" if setting == "graphs" else None
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        # Sizes do not change in training. But encoder and decoder run the same code, and torch would take the sizes of
        # the second for a change, and compile for sizes that vary.
        block.compile(mode=mode, dynamic=False)
    if setting == "graphs":
        # Every pass opens with the encoder; what the graphs put out in the pass before may be overwritten from there.
        model.encoder.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
