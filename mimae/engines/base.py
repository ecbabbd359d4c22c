"""What the loop knows about sharding, and nothing else."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimae import distributed
from mimae.checkpoints import dcp
from mimae.checkpoints.dcp import State
from mimae.engines import replicas
from mimae.engines.settings import Compile
from mimae.errors import UserError
from mimae.model import attention
from mimae.model.mimae import MIMAE
from mimae.objective.objective import Losses
from mimae.optim import adamw
from mimae.optim.optimizer import Optimizer, StepResult
from mimae.randomness import Part

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's malloc.h."""


class Engine(ABC):
    """One model on all ranks, its optimizer and its average. A group of one rank takes the same path.

    Of each parameter a rank keeps one part (`Part`), contiguous in the flattened whole and named by the parameter;
    optimizer and average work on parts. A state is made of parts of whole tensors, by name: one engine reads what
    another wrote.
    """

    is_spread: bool
    """Whether a forward of `model` is a collective, in which every rank has to take part."""

    parts: dict[str, Part]
    """Of every parameter, by name."""

    group: distributed.Group | None = None
    """The ranks that together hold each parameter; None: all of them."""

    shard = 0
    """Ranks with the same number hold the same `_copies`."""

    def __init__(self, model: MIMAE, recipe: Recipe, device: torch.device, views: int) -> None:
        """Takes over a `model` on the meta device, which gets the initial weights of the recipe's seed.

        Needs an initialised process group, of one rank too. In this order blocks are checkpointed (by the model, around
        each call), compiled, sharded. `views`: images x masks of the global batch.
        """
        self.num_parameters = sum(p.numel() for p in model.parameters())
        # No weight is used twice in a forward: the cache would only keep a second copy of all of them. Autocast lies
        # inside of what wraps the model, which then cannot switch it off.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False)
        model.forward = autocast(model.forward)  # type: ignore[method-assign]
        # Not with zero3: see `check_machine`.
        shape_model(model, "off" if recipe.engine.kind == "zero3" else recipe.compile, device)
        self.model = model
        if recipe.engine.kind != "ddp" and (device.type == "cpu" or recipe.engine.offload != "none"):
            return_memory()
        self.module, self.optimizer = self._shard(recipe, device, views)
        self.ema_decay = recipe.ema.decay
        self.ema = {n: p.values.detach().clone() for n, p in self.parts.items()} if recipe.ema.decay else {}

    @abstractmethod
    def _shard(self, recipe: Recipe, device: torch.device, views: int) -> tuple[nn.Module, Optimizer]:
        """Spreads `model` in place, fills it and sets `parts`; returns what forward calls, and the optimizer."""

    def forward(self, images: Tensor, visible: Tensor, targets: Tensor) -> Losses:
        """One micro-batch of this rank, in the run's precision."""
        return self.module(images, visible, targets)

    @abstractmethod
    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch; the last one ends the reduction of gradients over ranks."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the accumulated one."""
        loss.backward()

    def step(self, factor: float) -> StepResult:
        """Optimizer step at `factor` of the peak learning rates, and the average of weights."""
        result = self._update(factor)
        if self.ema_decay is not None:
            averages = list(self.ema.values())
            with torch.no_grad():
                moves = torch._foreach_sub([part.values for part in self.parts.values()], averages)
                torch._foreach_mul_(moves, (1 - self.ema_decay) * (1 - result.skipped))
                torch._foreach_add_(averages, moves)
        return result

    def state(self) -> State:
        """What this rank holds of the state by name, in the memory of the run: model.*, optimizer.*, ema.*"""
        return self._weights() | _named("optimizer", self._optimizer_state())

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from the tensors of a checkpoint, which any engine wrote on any number of ranks. Raises KeyError for
        what it lacks."""
        reader = dcp.Reader(path)
        has_stepped = any(name.startswith("optimizer.") for name in reader.described.state_dict_metadata)
        optimizer = self._empty_optimizer_state() if has_stepped else {}
        dcp.load(reader, self._weights() | _named("optimizer", optimizer))
        self._adopt(optimizer)

    def _weights(self) -> dict[str, Tensor | Part]:
        averages = {name: self.parts[name]._replace(values=values) for name, values in self.ema.items()}
        return _named("model", self._buffers()) | _named("model", self.parts) | _named("ema", averages)

    def check_copies(self) -> None:
        """Raises DivergenceError on every rank where copies of weights, or of averages, differ. A collective."""
        replicas.compare(self._copies() | self._buffers(), self.shard)

    def _copies(self) -> dict[str, Tensor]:
        """What ranks of the same `shard` hold alike, beside buffers."""
        return {name: part.values for name, part in self.parts.items()} | {f"ema.{n}": t for n, t in self.ema.items()}

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that are state, the same on every rank."""
        kept = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def _whole_norms(self, norms: Tensor) -> Tensor:
        """Norms of this rank's parts, stacked, -> those of the whole tensors."""
        return distributed.all_sum(norms.square(), self.group).sqrt()

    def _update(self, factor: float) -> StepResult:
        """The optimizer's step, and gradients set to zero."""
        return self.optimizer.step(factor)

    def _optimizer_state(self) -> dict[str, Tensor | Part]:
        """`step.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` of what has been stepped."""
        return {key: self._as_part(key, value) for key, value in self.optimizer.state_dict().items()}

    def _empty_optimizer_state(self) -> dict[str, Tensor | Part]:
        """The same, to be filled and adopted."""
        return {key: self._as_part(key, value) for key, value in self.optimizer.empty_state().items()}

    def _adopt(self, optimizer: Mapping[str, Tensor | Part]) -> None:
        """Takes over what was loaded; nothing, where no step had been taken."""
        if optimizer:
            self.optimizer.load_state_dict({k: v.values if isinstance(v, Part) else v for k, v in optimizer.items()})

    def _as_part(self, key: str, value: Tensor) -> Tensor | Part:
        return self.parts[key.partition(".")[2]]._replace(values=value) if value.ndim else value


def _named(section: str, values: Mapping[str, Tensor] | Mapping[str, Part] | State) -> dict[str, Tensor | Part]:
    return {f"{section}.{name}": value for name, value in values.items()}


def return_memory() -> None:
    """Has large tensors on the host given back to the system at once. Whole weights come and go with each block; glibc,
    which takes what is freed for a measure of what to keep, would let the holes between them grow to gigabytes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        for threshold in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(threshold, 4 * 2**20)


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Raises UserError for what a recipe asks by name and this machine cannot do."""
    model, decoder = recipe.model, recipe.decoder
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    heads = {model.width // model.heads, decoder.width // decoder.heads}
    obstacles = {
        f"engine.kind={recipe.engine.kind}": _obstacle(recipe),
        f"model.attention={model.attention}": attention.obstacle(model.attention, device, dtype, heads),
        f"engine.offload={recipe.engine.offload}": _offload_obstacle(recipe),
        f"optimizer.impl={recipe.optimizer.impl}": _optimizer_obstacle(recipe, device),
        f"compile={recipe.compile}": _compile_obstacle(recipe, device),
    }
    told = [f"{key} cannot run on this {device.type}: {reason}" for key, reason in obstacles.items() if reason]
    if told:
        raise UserError("\n".join([*told, "auto runs everywhere, as engine.kind=ddp does"]))


def _compile_obstacle(recipe: Recipe, device: torch.device) -> str | None:
    if recipe.engine.kind == "zero3" and recipe.compile in ("on", "graphs"):
        return "DeepSpeed gathers weights inside of the blocks, which tears apart what is compiled; fsdp does not"
    if recipe.compile != "graphs":
        return None
    if device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    return "CUDA graphs need weights that stay in place; fsdp gathers them" if recipe.engine.kind == "fsdp" else None


def _obstacle(recipe: Recipe) -> str | None:
    """Why the recipe's engine cannot run here or on as many ranks, in words; None where it can."""
    engine, ranks = recipe.engine, distributed.world_size()
    if ranks % engine.replicas:
        return f"engine.replicas={engine.replicas} does not divide the {ranks} ranks of the run"
    if engine.kind.startswith("zero") and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: pip install 'mimae[deepspeed]'"
    return None


def _offload_obstacle(recipe: Recipe) -> str | None:
    folder = recipe.engine.offload_path
    if folder is None:
        return None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return f"{folder} is no folder that can be written to"
    return files_obstacle()


def files_obstacle() -> str | None:
    """Why DeepSpeed cannot keep an optimizer in files here, in words; None where it can."""
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    missing = [op for op in ("async_io", "pin_memory") if not adamw.has_op(op)]
    if missing:
        return (
            f"DeepSpeed was built without {' and '.join(missing)}: install libaio-dev, then deepspeed with "
            "DS_BUILD_AIO=1 DS_BUILD_PIN_MEMORY=1 (docs/scaling.md)"
        )
    try:
        import_module("deepspeed.ops.op_builder").AsyncIOBuilder().load()
    except ImportError as error:
        return f"DeepSpeed's async_io does not load: {error}"
    return None


def _optimizer_obstacle(recipe: Recipe, device: torch.device) -> str | None:
    impl, is_zero, home = recipe.optimizer.impl, recipe.engine.kind.startswith("zero"), optimizer_device(recipe, device)
    if is_zero and impl == "apex":
        return "DeepSpeed steps torch's AdamW here, or its own"
    if impl == "deepspeed" and home.type != "cpu" and not is_zero:
        return (
            "DeepSpeed's FusedAdam counts steps on the host, so a step that is not finite could only be left out by "
            "waiting for the device in every step, as ZeRO does anyway; optimizer.impl=torch has as few launches"
        )
    return adamw.IMPLEMENTATIONS[impl].obstacle(home)


def optimizer_device(recipe: Recipe, device: torch.device) -> torch.device:
    """Where a run on `device` steps its parameters."""
    return device if recipe.engine.offload == "none" else torch.device("cpu")


def compiles(setting: Compile, device: torch.device) -> bool:
    """Whether the setting `compile` compiles blocks on a device."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")


def shape_model(model: MIMAE, setting: Compile, device: torch.device) -> None:
    """Compiles each transformer block in place; before sharding, after checkpointing (which wraps the call)."""
    if not compiles(setting, device):
        return
    mode = "reduce-overhead" if setting == "graphs" else None
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        # Sizes do not change in training. But encoder and decoder run the same code, and torch would take the sizes of
        # the second for a change, and compile for sizes that vary.
        block.compile(mode=mode, dynamic=False)
    if setting == "graphs":
        # Every pass opens with the encoder; what the graphs put out in the pass before may be overwritten from there.
        model.encoder.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
