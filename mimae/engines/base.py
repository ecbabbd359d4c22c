"""The interface of engines. The trainer knows about sharding only through it."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mimae import distributed
from mimae.checkpoints import dcp
from mimae.checkpoints.dcp import State
from mimae.engines import replicas
from mimae.engines.compiling import compile_units
from mimae.engines.settings import Compile, EngineSettings
from mimae.model.settings import Checkpointing
from mimae.model.units import Model
from mimae.optim import adamw
from mimae.optim.groups import Rule
from mimae.optim.optimizer import Optimizer, StepResult
from mimae.optim.settings import OptimizerSettings
from mimae.randomness import Part

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameter numbers of `mallopt` in glibc's malloc.h."""


class Setup(NamedTuple):
    """Settings of a run that an engine needs."""

    engine: EngineSettings
    optimizer: OptimizerSettings
    precision: Literal["fp32", "bf16"]
    compile: Compile
    checkpointing: Checkpointing
    ema_decay: float | None
    batch_size: int
    """Images of an optimizer step, over all ranks and micro-batches."""
    accumulate: int
    """Micro-batches of an optimizer step."""
    run: Path
    """The run's directory."""


M = TypeVar("M", bound=Model)

Start = Callable[[Model, Mapping[str, Part]], None]
"""Function that fills this rank's parts of a model's parameters with the start weights."""

Obstacles = dict[str, str | None]
"""Reasons, by `key=value` of the settings, why this machine cannot do what the key asks; None if it can."""


class Engine(ABC, Generic[M]):
    """One model on all ranks, with its optimizer and its moving average. A single rank takes the same path.

    A rank holds one part (`Part`) of each parameter, which is contiguous in the flattened parameter. Optimizer and
    average work on these parts. A state consists of named parts of whole tensors, so an engine can read the checkpoint
    of another engine.
    """

    spreads: ClassVar[frozenset[Literal["optimizer", "gradients", "weights"]]]
    """Kinds of state that are sharded over the ranks; each rank holds a full copy of the others.

    If weights are sharded, a forward is a collective.
    """

    compiles: ClassVar[bool] = True
    """True if the model's units can be compiled."""

    parts: dict[str, Part]
    """This rank's part of every parameter, by name."""

    group: distributed.Group | None = None
    """The ranks that together hold each parameter; None: all ranks."""

    shard = 0
    """Number of this rank's shard. Ranks with the same number hold the same `_copies`."""

    def __init__(self, model: M, setup: Setup, device: torch.device, rule: Rule, start: Start) -> None:
        """Prepare a `model` that is on the meta device: `start` fills its weights, `rule` gives the optimizer's groups.

        A process group has to be initialised, even for one rank. Units are checkpointed (by the model, around each
        call), compiled and sharded, in this order.
        """
        self.num_parameters = sum(p.numel() for p in model.parameters())
        # No weight is used twice in a forward, so autocast's cache would only keep a second copy of all weights.
        # Autocast is applied inside the wrappers of the model, which then cannot switch it off.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=setup.precision == "bf16", cache_enabled=False)
        model.forward = autocast(model.forward)  # type: ignore[method-assign]
        if self.compiles:
            compile_units(model, setup.compile, setup.checkpointing, device)
        self.model = model
        if self.spreads and (device.type == "cpu" or setup.engine.offload != "none"):
            return_memory()
        self.module, self.optimizer = self._shard(setup, device, rule, start)
        self.ema_decay = setup.ema_decay
        self.ema = {n: p.values.detach().clone() for n, p in self.parts.items()} if setup.ema_decay else {}

    @classmethod
    def obstacles(cls, setup: Setup, device: torch.device) -> Obstacles:
        """Return the obstacles for this engine on this machine and with this number of ranks."""
        engine, impl, kind = setup.engine, setup.optimizer.impl, setup.optimizer.kind
        needs_whole = "LARS needs the norms of whole weights, but this engine steps parts of them; use engine.kind=ddp"
        return {
            f"engine.kind={engine.kind}": cls.obstacle(engine),
            f"engine.offload={engine.offload}": cls.offload_obstacle(engine),
            f"optimizer.kind={kind}": needs_whole if kind == "lars" and cls.spreads else None,
            f"optimizer.impl={impl}": cls.optimizer_obstacle(impl, optimizer_device(engine, device)),
            f"compile={setup.compile}": cls.compile_obstacle(setup, device),
            f"model.checkpointing={setup.checkpointing}": cls.checkpointing_obstacle(setup),
        }

    @classmethod
    def obstacle(cls, engine: EngineSettings) -> str | None:
        """Return the reason why the engine cannot run here at all, or None if it can."""
        return None

    @classmethod
    def offload_obstacle(cls, engine: EngineSettings) -> str | None:
        """Return the reason why state cannot be offloaded as the settings ask, or None if it can."""
        return None

    @classmethod
    def optimizer_obstacle(cls, impl: str, home: torch.device) -> str | None:
        """Return the reason why an implementation of the optimizer cannot step parameters on the device `home`, or
        None if it can.
        """
        if impl == "deepspeed" and home.type != "cpu":
            return (
                "DeepSpeed's FusedAdam counts steps on the host, so skipping a step that is not finite would need a "
                "wait for the device in every step, as ZeRO does anyway; optimizer.impl=torch needs as few launches"
            )
        return adamw.IMPLEMENTATIONS[impl].obstacle(home)

    @classmethod
    def compile_obstacle(cls, setup: Setup, device: torch.device) -> str | None:
        """Return the reason why units cannot be compiled as the setting asks, or None if they can."""
        if setup.compile != "graphs":
            return None
        if device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if setup.accumulate > 1:
            return (
                f"torch's CUDA graphs are known to give wrong gradients if gradients accumulate (schedule.accumulate="
                f"{setup.accumulate}; pytorch issues 169545 and 96693); use compile=on, or schedule.accumulate=1"
            )
        return None

    @classmethod
    def checkpointing_obstacle(cls, setup: Setup) -> str | None:
        """Return the reason why activations cannot be recomputed as the setting asks, or None if they can."""
        if setup.checkpointing == "full" and setup.compile == "graphs":
            return (
                "CUDA graphs replay a forward into memory that its recomputation would overwrite; compile=on does not"
            )
        return None

    @abstractmethod
    def _shard(self, setup: Setup, device: torch.device, rule: Rule, start: Start) -> tuple[nn.Module, Optimizer]:
        """Shard `self.model` in place, fill its weights and set `self.parts`.

        Returns the module that `forward` calls, and the optimizer.
        """

    def _trained(self) -> dict[str, Part]:
        """Return the parts of all parameters that are trained, without those that the model has frozen."""
        return {name: self.parts[name] for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def is_spread(self) -> bool:
        """True if a forward of `model` is a collective, in which every rank has to take part."""
        return "weights" in self.spreads

    def forward(self, *inputs: Tensor) -> Any:
        """Return the model's output for one micro-batch of this rank, in the run's precision."""
        return self.module(*inputs)

    @abstractmethod
    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch's forward and backward.

        The last micro-batch of a step completes the reduction of gradients over ranks.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the accumulated gradients."""
        loss.backward()

    def step(self, factor: float) -> StepResult:
        """Take an optimizer step at `factor` times the peak learning rates, and update the average of weights."""
        result = self._update(factor)
        if self.ema_decay is not None:
            averages = list(self.ema.values())
            with torch.no_grad():
                moves = torch._foreach_sub([part.values for part in self.parts.values()], averages)
                torch._foreach_mul_(moves, (1 - self.ema_decay) * (1 - result.skipped))
                torch._foreach_add_(averages, moves)
        return result

    def state(self) -> State:
        """Return this rank's share of the state by name: model.*, optimizer.*, ema.* The tensors are not copied."""
        return self._weights() | _named("optimizer", self._optimizer_state())

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Load the tensors of a checkpoint, which may be from any engine and any number of ranks.

        Raises KeyError for a tensor that the checkpoint lacks.
        """
        reader = dcp.Reader(path)
        has_stepped = any(name.startswith("optimizer.") for name in reader.described.state_dict_metadata)
        optimizer = self._empty_optimizer_state() if has_stepped else {}
        dcp.load(reader, self._weights() | _named("optimizer", optimizer))
        self._adopt(optimizer)

    def _weights(self) -> dict[str, Tensor | Part]:
        averages = {name: self.parts[name]._replace(values=values) for name, values in self.ema.items()}
        return _named("model", self._buffers()) | _named("model", self.parts) | _named("ema", averages)

    def check_copies(self) -> None:
        """Raise DivergenceError on every rank if copies of weights or of averages differ. This is a collective."""
        replicas.compare(self._copies() | self._buffers(), self.shard)

    def _copies(self) -> dict[str, Tensor]:
        """Return the tensors, without buffers, of which ranks of the same `shard` hold equal copies."""
        return {name: part.values for name, part in self.parts.items()} | {f"ema.{n}": t for n, t in self.ema.items()}

    def _buffers(self) -> dict[str, Tensor]:
        """Return the buffers that belong to the state; they are equal on every rank."""
        kept = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def _whole_norms(self, norms: Tensor) -> Tensor:
        """Return the norms of whole tensors, given the stacked norms of this rank's parts."""
        return distributed.all_sum(norms.square(), self.group).sqrt()

    def _update(self, factor: float) -> StepResult:
        """Take the optimizer's step, and set the gradients to zero."""
        return self.optimizer.step(factor)

    def _optimizer_state(self) -> dict[str, Tensor | Part]:
        """Return `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` of every parameter that has been stepped."""
        return {key: self._as_part(key, value) for key, value in self.optimizer.state_dict().items()}

    def _empty_optimizer_state(self) -> dict[str, Tensor | Part]:
        """Return a state with the keys of `_optimizer_state`, to be filled and adopted."""
        return {key: self._as_part(key, value) for key, value in self.optimizer.empty_state().items()}

    def _adopt(self, optimizer: Mapping[str, Tensor | Part]) -> None:
        """Use the optimizer state that was loaded; it is empty if the run had taken no step."""
        if optimizer:
            self.optimizer.load_state_dict({k: v.values if isinstance(v, Part) else v for k, v in optimizer.items()})

    def _as_part(self, key: str, value: Tensor) -> Tensor | Part:
        return self.parts[key.partition(".")[2]]._replace(values=value) if value.ndim else value


def _named(section: str, values: Mapping[str, Tensor] | Mapping[str, Part] | State) -> dict[str, Tensor | Part]:
    return {f"{section}.{name}": value for name, value in values.items()}


def return_memory() -> None:
    """Make the C library return large freed tensors to the system at once.

    Whole weights are allocated and freed with each block. glibc raises its mmap threshold after large frees; heap
    fragmentation would then reach gigabytes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        for threshold in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(threshold, 4 * 2**20)


def optimizer_device(engine: EngineSettings, device: torch.device) -> torch.device:
    """Return the device on which a run on `device` steps its parameters: the host if the optimizer is offloaded."""
    return device if engine.offload == "none" else torch.device("cpu")
