"""ZeRO of DeepSpeed: the optimizer (stage 1), gradients (stage 2) and weights (stage 3) are sharded over ranks.

DeepSpeed's configuration follows from the run's settings. DeepSpeed steps AdamW, torch's or its own, on flat fp32
partitions, one or more for each group of parameters. Autocast is applied by mimae, as in the other engines, so
DeepSpeed's own reduced precision stays off. DeepSpeed skips a step whose gradient is not finite; for this the host
reads the norm in every step.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mimae import distributed
from mimae.engines.base import Engine, M, Setup, Start, optimizer_device
from mimae.engines.settings import EngineSettings
from mimae.errors import UserError
from mimae.optim import adamw
from mimae.optim.groups import MAIN, Rule
from mimae.optim.optimizer import Optimizer, StepResult
from mimae.randomness import Part, materialise

_MOMENTS = ("exp_avg", "exp_avg_sq")


def bucket(block: int) -> int:
    """Return the number of elements of DeepSpeed's buffers for a model whose largest block has `block` parameters.

    DeepSpeed's own default, half a billion, takes 2 GB in fp32 for every model. Buffers above 40 MB do not use a link
    better.
    """
    return max(10_000_000, block)


LIVE = 3
"""Maximal number of buckets of weights that ZeRO-3 keeps gathered."""


class _Place(NamedTuple):
    """Place of this rank's part of a parameter: `length` elements of a flat partition, from `first` on."""

    partition: int
    first: int
    length: int

    def within(self, values: Tensor) -> Tensor:
        """Return the part's elements of a tensor that has the layout of the flat partition."""
        return values[self.first : self.first + self.length]


class ZeroEngine(Engine[M]):
    """Engine for DeepSpeed's ZeRO, see `engines.base.Engine`.

    With stages 1 and 2 a rank holds a share of each parameter group, and its part of a parameter is the overlap with
    that share. With stage 3 it holds a share of the elements of each parameter. Stages 2 and 3 reduce gradients after
    every micro-batch, so that no rank holds whole gradients; stage 1 reduces them after the last one.
    """

    stage: ClassVar[int]
    """DeepSpeed's stage, which says what is sharded."""

    module: Any

    @classmethod
    def obstacle(cls, engine: EngineSettings) -> str | None:
        if find_spec("deepspeed") is None:
            return "DeepSpeed is not installed: pip install 'mimae[deepspeed]'"
        return None

    @classmethod
    def optimizer_obstacle(cls, impl: str, home: torch.device) -> str | None:
        if impl == "apex":
            return "DeepSpeed steps only torch's AdamW or its own; use optimizer.impl=torch or deepspeed"
        return adamw.IMPLEMENTATIONS[impl].obstacle(home)

    def _shard(self, setup: Setup, device: torch.device, rule: Rule, start: Start) -> tuple[nn.Module, Optimizer]:
        deepspeed = _import(device)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        units = self.model.units()
        folder = _folder(setup, self.num_parameters)
        largest = max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0)
        config = _config(self.stage, setup, device, largest, folder)
        # If weights are sharded, no rank holds more than one whole unit at a time.
        modules: list[nn.Module] = [*units, self.model]
        for module in modules:
            materialise(module, device)
            if self.is_spread:
                deepspeed.zero.Init(module=module, config_dict_or_path=config)
        whole = {name: Part(p, 0, shapes[name]) for name, p in self.model.named_parameters()}
        optimizer = Optimizer(whole, setup.optimizer, rule, optimizer_device(setup.engine, device))
        optimizer.stepper.optimizer.register_step_pre_hook(_scale)
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer.stepper.optimizer, config=config)
        self.zero: Any = engine.optimizer
        if folder is not None:
            _keep_misaligned_gradients(self.zero.optimizer_swapper)
        self.places, self.parts = {}, {}
        for name, parameter in self.model.named_parameters():
            place, first = self._find(parameter)
            values = place.within(self._at_rest(place.partition, self.flats[place.partition]))
            self.places[name], self.parts[name] = place, Part(values, first, shapes[name])
        start(self.model, self.parts)
        self._publish()
        return engine, optimizer

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy this rank's parts to the tensors that forward reads.

        Forward reads copies of the partitions: whole parameters, or with stage 3 the shares that it gathers.
        """
        parameter: Any  # DeepSpeed adds attributes to parameters.
        for name, parameter in self.model.named_parameters():
            part = self.parts[name]
            if self.is_spread:
                parameter.ds_tensor[: part.values.numel()].copy_(part.values)
            if parameter.shape == part.shape:
                parameter.copy_(_whole(part))

    def _find(self, parameter: Any) -> tuple[_Place, int]:
        """Return the place of this rank's part of a parameter, and the part's start in the whole parameter."""
        if self.is_spread:
            group, first, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(distributed.rank() * count, parameter.ds_numel)
            return _Place(group, first, min(count, parameter.ds_numel - start)), start
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Place(0, 0, 0), 0
        inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Place(mapping.param_group_index, inside.start, inside.numel), whole.start

    @property
    def flats(self) -> list[Any]:
        """This rank's fp32 partitions. If they are in files, they are empty tensors with attributes of DeepSpeed."""
        return self.zero.fp32_partitioned_groups_flat if self.is_spread else self.zero.single_partition_of_fp32_groups

    def _at_rest(self, partition: int, tensor: Any) -> Tensor:
        """Return the values of a partition, or of one of its moments, between steps."""
        return tensor.detach() if tensor.numel() else self._file(partition, tensor.ds_id)

    def _file(self, partition: int, name: str) -> Tensor:
        """Return the memory-mapped file in which DeepSpeed keeps a partition.

        Reads and writes go to the file. The system keeps only as much of it in memory as there is room for.
        """
        swapper, length = self.zero.optimizer_swapper, self.zero.fp16_partitioned_groups_flat_numel[partition]
        path = f"{swapper.swap_folder}/{name}.tensor.swp"
        return torch.from_file(path, shared=True, size=swapper._io_aligned_numel(length))[:length]

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        self.module.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)  # The trainer has divided by the number of micro-batches.

    def _update(self, factor: float) -> StepResult:
        self.optimizer.set_rates(factor)
        groups = self.optimizer.stepper.optimizer.param_groups
        squares = dict.fromkeys((group["clip"] for group in groups), 0.0)
        for place, norm in self._norms():
            # DeepSpeed returns the norm -1 for a gradient that is not finite.
            squares[groups[place]["clip"]] += norm**2 if norm >= 0 else math.nan
        clip = self.optimizer.settings.clip
        for group in groups:
            norm = math.sqrt(squares[group["clip"]])
            group["scale"] = 1.0 if clip is None else min(clip / (norm + 1e-6), 1.0)
        self.module.step()
        # The result is on the device of the parts, which may be the host: the average of weights reads it there.
        result = torch.tensor([math.sqrt(squares[MAIN]), float(self.zero.overflow)], device=self.flats[0].device)
        return StepResult(result[0], result[1])

    def _norms(self) -> Iterator[tuple[int, float]]:
        """Yield (parameter group, norm of a partition's gradient over all ranks) for each partition."""
        zero = self.zero
        if self.is_spread:
            yield from zip(zero.sub_group_to_group_id.values(), map(float, zero._get_norm_groups()), strict=True)
            return
        for group, parameters in enumerate(zero.params_in_partition):
            if zero.cpu_offload:
                norm = zero.complete_grad_norm_calculation_for_cpu_offload(parameters)
            else:
                norm = zero.get_grad_norm_direct(zero.averaged_gradients[group], parameters)
            yield group, float(norm)

    def _optimizer_state(self) -> dict[str, Tensor | Part]:
        states = self.optimizer.stepper.state()
        # All partitions have the same step count. A rank without a share of a partition has no count for it.
        steps = [states[flat]["step"] for flat in self.flats if flat in states]
        found: dict[str, Tensor | Part] = {}
        for name, place in self.places.items():
            if steps:
                found[f"step.{name}"] = steps[0]
                for kind in _MOMENTS:
                    moment = self._at_rest(place.partition, states[self.flats[place.partition]][kind])
                    found[f"{kind}.{name}"] = self.parts[name]._replace(values=place.within(moment))
        return found

    def _empty_optimizer_state(self) -> dict[str, Tensor | Part]:
        for partition, flat in enumerate(self.flats):
            in_files = flat.numel() == 0
            moments = {
                kind: self._file(partition, f"{kind}-{flat.ds_id}").zero_() if in_files else torch.zeros_like(flat)
                for kind in _MOMENTS
            }
            # torch's fused kernels expect the step count on the device of the weights.
            self.optimizer.stepper.load({flat: {**moments, "step": torch.zeros((), device=flat.device)}})
            if in_files:
                self.zero.optimizer_swapper._get_param_swap_info(flat)  # It registers the moments by their size.
                for moment in moments.values():
                    moment.data = torch.empty(0)
        return self._optimizer_state()

    def _copies(self) -> dict[str, Tensor]:
        return {} if self.is_spread else dict(self.model.named_parameters())

    def _adopt(self, optimizer: Mapping[str, Tensor | Part]) -> None:
        if optimizer:
            stepper, step = self.optimizer.stepper, optimizer[f"step.{next(iter(self.parts))}"]
            assert isinstance(step, Tensor)
            states = stepper.state()
            stepper.load({flat: {**states[flat], "step": step.clone()} for flat in self.flats})
        self._publish()


class Zero1Engine(ZeroEngine[M]):
    """Engine for ZeRO stage 1: the optimizer is sharded."""

    stage = 1
    spreads = frozenset({"optimizer"})


class Zero2Engine(ZeroEngine[M]):
    """Engine for ZeRO stage 2: optimizer and gradients are sharded."""

    stage = 2
    spreads = frozenset({"optimizer", "gradients"})


class Zero3Engine(ZeroEngine[M]):
    """Engine for ZeRO stage 3: optimizer, gradients and weights are sharded."""

    stage = 3
    spreads = frozenset({"optimizer", "gradients", "weights"})
    compiles = False

    @classmethod
    def offload_obstacle(cls, engine: EngineSettings) -> str | None:
        folder = engine.offload_path
        if folder is None:
            return None
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            return f"{folder} is not a folder that can be written to"
        return files_obstacle()

    @classmethod
    def compile_obstacle(cls, setup: Setup, device: torch.device) -> str | None:
        if setup.compile in ("on", "graphs"):
            return "DeepSpeed gathers weights inside the blocks, which breaks the compiled graphs; fsdp does not"
        return None

    @classmethod
    def checkpointing_obstacle(cls, setup: Setup) -> str | None:
        if setup.checkpointing == "selective":
            return (
                "with engine.kind=zero3, which gathers weights inside blocks, its losses differed from those without "
                "by more than rounding; model.checkpointing=full works, and so does engine.kind=fsdp"
            )
        return super().checkpointing_obstacle(setup)


def files_obstacle() -> str | None:
    """Return the reason why DeepSpeed cannot keep an optimizer in files on this machine, or None if it can."""
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


def _whole(part: Part) -> Tensor:
    """Return a whole parameter, gathered from the parts of all ranks."""
    whole = part.values.new_zeros(part.shape.numel())
    whole[part.start : part.start + part.values.numel()] = part.values.flatten()
    return distributed.all_sum(whole).view(part.shape)


def _scale(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Clip the gradients of the group that DeepSpeed is about to step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(group["scale"])


def _keep_misaligned_gradients(swapper: Any) -> None:
    """Keep gradients in memory whose offset in a partition is not aligned to a block of the disk.

    DeepSpeed would read them from a file to the unaligned offset, and would not check whether the read succeeded.
    """
    split = swapper._adjust_for_misaligned_lengths

    def aligned(tensors: list[Any], offsets: list[int]) -> Any:
        for tensor, offset in zip(tensors, offsets, strict=True):
            tensor.swappable = offset % swapper.numel_alignment == 0
        return split(tensors, offsets)

    swapper._adjust_for_misaligned_lengths = aligned


def _folder(setup: Setup, num_parameters: int) -> Path | None:
    """Return this machine's folder for the files of DeepSpeed, or None if it keeps none. This is a collective.

    The folder is removed when the machine's first process ends. Raises UserError if the disk is too small.
    """
    if setup.engine.offload_path is None:
        return None
    run = hashlib.sha256(str(setup.run.absolute()).encode()).hexdigest()[:16]
    folder = setup.engine.offload_path / f"mimae-{run}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)  # A process that was killed may have left files.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    distributed.gather_objects(None)
    ranks, here = distributed.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    needed, free = 16 * num_parameters * here // ranks, shutil.disk_usage(setup.engine.offload_path).free
    if free < needed:
        raise UserError(
            f"engine.offload_path={setup.engine.offload_path} has {free / 1e9:.2g} GB free, but the optimizer of this "
            f"machine's ranks needs {needed / 1e9:.2g} GB: choose a larger disk, or use more machines"
        )
    return folder


def _config(stage: int, setup: Setup, device: torch.device, unit: int, folder: Path | None) -> dict[str, Any]:
    """Return DeepSpeed's own settings; `unit` is the number of parameters of the model's largest unit."""
    buffer = bucket(unit)
    spread: dict[str, Any] = {"stage": stage, "reduce_bucket_size": buffer, "allgather_bucket_size": buffer}
    if stage == 3:
        spread |= {"stage3_prefetch_bucket_size": buffer}
        spread |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), LIVE * buffer)
    if setup.engine.offload != "none":
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        spread |= {"offload_optimizer": host} | ({"offload_param": host} if stage == 3 else {})
    if folder is not None:
        # Partitions of this size are read into memory one after another, and written back.
        spread |= {"sub_group_size": buffer}
        spread["offload_optimizer"] = {**host, "device": "nvme", "nvme_path": str(folder)}
    return {
        "train_micro_batch_size_per_gpu": setup.batch_size // (setup.accumulate * distributed.world_size()),
        "gradient_accumulation_steps": setup.accumulate,
        "zero_optimization": spread,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
    }


def _import(device: torch.device) -> Any:
    """Import DeepSpeed, with its logging reduced to errors and without building its extensions."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = import_module("deepspeed")
    import_module("deepspeed.utils").logger.setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by the names that they had before torch 2.14.
    warnings.filterwarnings("ignore", r".*`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would compile its collectives in shared memory at the first start, silently and for minutes; gloo has
    # equivalent ones.
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def restore_linear() -> None:
    """Give torch its own `linear` back, which DeepSpeed replaces in the whole process when zero3 spreads a model.

    DeepSpeed's form adds the bias in place, to a product that selective checkpointing keeps for the recomputation.
    """
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    torchs = getattr(getattr(module, "InsertPostInitMethodToModuleSubClasses", None), "linear_bk", None)
    if torchs is not None:
        torch.nn.functional.linear = torchs
