"""The interface of engines, which is all that the trainer knows about sharding."""

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
from mimae.engines.settings import Compile, EngineSettings
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
    ema_decay: float | None
    batch_size: int
    """Images of an optimizer step, over all ranks and micro-batches."""
    accumulate: int
    """Micro-batches of an optimizer step."""
    run: Path
    """The run's directory."""


M = TypeVar("M", bound=Model)

Start = Callable[[Model, Mapping[str, Part]], None]
"""Fills this rank's parts of a model's parameters with the start weights."""

Obstacles = dict[str, str | None]
"""Reasons, by `key=value` of the settings, why this machine cannot do what the key asks; None where it can."""


class Engine(ABC, Generic[M]):
    """One model on all ranks, its optimizer and its average. A group of one rank takes the same path.

    Of each parameter a rank keeps one part (`Part`), contiguous in the flattened whole and named by the parameter;
    optimizer and average work on parts. A state is made of parts of whole tensors, by name: one engine reads what
    another wrote.
    """

    spreads: ClassVar[frozenset[Literal["optimizer", "gradients", "weights"]]]
    """State that is divided among the ranks; each rank holds the rest whole.

    If weights are divided, a forward is a collective.
    """

    compiles: ClassVar[bool] = True
    """True if the model's units can be compiled."""

    parts: dict[str, Part]
    """This rank's part of every parameter, by name."""

    group: distributed.Group | None = None
    """The ranks that together hold each parameter; None: all of them."""

    shard = 0
    """Ranks with the same number hold the same `_copies`."""

    def __init__(self, model: M, setup: Setup, device: torch.device, rule: Rule, start: Start) -> None:
        """Take over a `model` on the meta device, which gets its weights from `start`; `rule` gives the optimizer's
        groups.

        Needs an initialised process group, of one rank too. In this order units are checkpointed (by the model, around
        each call), compiled, sharded.
        """
        self.num_parameters = sum(p.numel() for p in model.parameters())
        # No weight is used twice in a forward: the cache would only keep a second copy of all of them. Autocast lies
        # inside of what wraps the model, which then cannot switch it off.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=setup.precision == "bf16", cache_enabled=False)
        model.forward = autocast(model.forward)  # type: ignore[method-assign]
        if self.compiles:
            compile_units(model, setup.compile, device)
        self.model = model
        if self.spreads and (device.type == "cpu" or setup.engine.offload != "none"):
            return_memory()
        self.module, self.optimizer = self._shard(setup, device, rule, start)
        self.ema_decay = setup.ema_decay
        self.ema = {n: p.values.detach().clone() for n, p in self.parts.items()} if setup.ema_decay else {}

    @classmethod
    def obstacles(cls, setup: Setup, device: torch.device) -> Obstacles:
        """Return what stands against this engine on this machine and number of ranks."""
        engine, impl, kind = setup.engine, setup.optimizer.impl, setup.optimizer.kind
        needs_whole = (
            "LARS needs the norms of whole weights, and this engine steps parts of them; engine.kind=ddp does not"
        )
        return {
            f"engine.kind={engine.kind}": cls.obstacle(engine),
            f"engine.offload={engine.offload}": cls.offload_obstacle(engine),
            f"optimizer.kind={kind}": needs_whole if kind == "lars" and cls.spreads else None,
            f"optimizer.impl={impl}": cls.optimizer_obstacle(impl, optimizer_device(engine, device)),
            f"compile={setup.compile}": cls.compile_obstacle(setup, device),
        }

    @classmethod
    def obstacle(cls, engine: EngineSettings) -> str | None:
        """Return why the engine cannot run here at all."""
        return None

    @classmethod
    def offload_obstacle(cls, engine: EngineSettings) -> str | None:
        """Return why what is offloaded cannot be kept where the settings say."""
        return None

    @classmethod
    def optimizer_obstacle(cls, impl: str, home: torch.device) -> str | None:
        """Return why an implementation of the optimizer cannot step parameters that lie on `home`."""
        if impl == "deepspeed" and home.type != "cpu":
            return (
                "DeepSpeed's FusedAdam counts steps on the host, so a step that is not finite could only be left out "
                "by waiting for the device in every step, as ZeRO does anyway; optimizer.impl=torch has as few launches"
            )
        return adamw.IMPLEMENTATIONS[impl].obstacle(home)

    @classmethod
    def compile_obstacle(cls, setup: Setup, device: torch.device) -> str | None:
        """Return why units cannot be compiled as the setting asks."""
        if setup.compile != "graphs":
            return None
        if device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if setup.accumulate > 1:
            return (
                f"torch's CUDA graphs are known to give wrong gradients where they accumulate (schedule.accumulate="
                f"{setup.accumulate}; pytorch issues 169545 and 96693); legal is compile=on, or schedule.accumulate=1"
            )
        return None

    @abstractmethod
    def _shard(self, setup: Setup, device: torch.device, rule: Rule, start: Start) -> tuple[nn.Module, Optimizer]:
        """Spread `model` in place, fill it and set `parts`; return what forward calls, and the optimizer."""

    def _trained(self) -> dict[str, Part]:
        """Return the parts of the parameters that are trained: without those that the model has frozen."""
        return {name: self.parts[name] for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def is_spread(self) -> bool:
        """Return whether a forward of `model` is a collective, in which every rank has to take part."""
        return "weights" in self.spreads

    def forward(self, *inputs: Tensor) -> Any:
        """The model's output for one micro-batch of this rank, in the run's precision."""
        return self.module(*inputs)

    @abstractmethod
    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch; the last one ends the reduction of gradients over ranks."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the accumulated one."""
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
        """Return this rank's share of the state by name, in the memory of the run: model.*, optimizer.*, ema.*"""
        return self._weights() | _named("optimizer", self._optimizer_state())

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from the tensors of a checkpoint, which any engine wrote on any number of ranks. Raises KeyError for
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
        """Raise DivergenceError on every rank where copies of weights, or of averages, differ. A collective."""
        replicas.compare(self._copies() | self._buffers(), self.shard)

    def _copies(self) -> dict[str, Tensor]:
        """Return the tensors, other than buffers, that ranks of the same `shard` hold in equal copies."""
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
        """Return a state with the keys of `_optimizer_state`, to be filled and adopted."""
        return {key: self._as_part(key, value) for key, value in self.optimizer.empty_state().items()}

    def _adopt(self, optimizer: Mapping[str, Tensor | Part]) -> None:
        """Take over what was loaded; nothing, where no step had been taken."""
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


def optimizer_device(engine: EngineSettings, device: torch.device) -> torch.device:
    """Return where a run on `device` steps its parameters."""
    return device if engine.offload == "none" else torch.device("cpu")


def will_compile(setting: Compile, device: torch.device) -> bool:
    """Return whether the setting `compile` compiles units on a device."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")


def compile_units(model: Model, setting: Compile, device: torch.device) -> None:
    """Compile each unit of a model in place; before sharding, after checkpointing (which wraps the call)."""
    if not will_compile(setting, device):
        return
    from torch import _dynamo, _functorch

    # Inside DistributedDataParallel dynamo cuts a graph where DDP's buckets end, so that reductions start before the
    # end of a graph's backward. A unit is too small to gain from that; cut in two it fuses less and keeps more.
    _dynamo.config.optimize_ddp = False
    _functorch.config.activation_memory_budget = model.compiled_budget
    mode = "reduce-overhead" if setting == "graphs" else None
    for unit in model.units():
        # Sizes do not change in training. But units of different sizes may run the same code (encoder and decoder do),
        # and torch would take the sizes of the second for a change, and compile for sizes that vary.
        unit.compile(mode=mode, dynamic=False)
    if setting == "graphs":
        # What the graphs put out in the pass before may be overwritten from here on.
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
