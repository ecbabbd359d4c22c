"""The fsdp engine: torch's FSDP2 shards weights, gradients and optimizer over ranks.

A block has its whole weights only while it computes. Weights are gathered and gradients reduced in fp32, and autocast
computes in bf16, as under DDP. A mixed-precision policy of FSDP2 would also round the weights of the norms, which
autocast does not. Without model.checkpointing autograd keeps the bf16 copy of each block's weights until its backward,
so a model that is sharded to save memory should use both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from mimae import distributed
from mimae.engines.base import Engine, M, Setup, Start, optimizer_device
from mimae.engines.settings import EngineSettings
from mimae.optim.groups import Rule
from mimae.optim.optimizer import Optimizer, StepResult
from mimae.randomness import Part, materialise


class FSDPEngine(Engine[M]):
    """Engine for FSDP2, see `engines.base.Engine`.

    A rank's part of a parameter is some of its rows, in the order of ranks. With replicas each group of neighbouring
    ranks holds all rows. Inside a replica gradients are reduced after every micro-batch, so that no rank holds whole
    gradients; across replicas they are reduced only after the last micro-batch.
    """

    spreads = frozenset({"optimizer", "gradients", "weights"})

    @classmethod
    def obstacle(cls, engine: EngineSettings) -> str | None:
        ranks = distributed.world_size()
        if ranks % engine.replicas:
            return f"engine.replicas={engine.replicas} does not divide the {ranks} ranks of the run"
        return None

    @classmethod
    def compile_obstacle(cls, setup: Setup, device: torch.device) -> str | None:
        if setup.compile == "graphs" and device.type == "cuda":
            return "CUDA graphs need weights that stay in place; fsdp gathers them"
        return super().compile_obstacle(setup, device)

    def _shard(self, setup: Setup, device: torch.device, rule: Rule, start: Start) -> tuple[nn.Module, Optimizer]:
        replicas = setup.engine.replicas
        shape = (replicas, distributed.world_size() // replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():
            distributed.be_patient(group)  # torch's default timeout may be shorter than the run's first step.
        self.group, self.shard = mesh.get_group("shard"), mesh.get_local_rank("shard")
        is_offloaded, home = setup.engine.offload == "cpu", optimizer_device(setup.engine, device)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if is_offloaded else OffloadPolicy()
        modules: list[nn.Module] = [*self.model.units(), self.model]
        for module in modules:
            fully_shard(module, mesh=mesh if replicas > 1 else mesh["shard"], offload_policy=offload)
        # The root's own weights have to be gathered for the forward methods of evaluation, too.
        for method in self.model.evaluations:
            register_fsdp_forward_method(self.model, method)
        materialise(self.model, home)
        for buffer in self.model.buffers():
            buffer.data = buffer.to(device)
        self.parts = {name: _rows(p, mesh["shard"]) for name, p in self.model.named_parameters()}
        start(self.model, self.parts)
        return self.model, Optimizer(self._trained(), setup.optimizer, rule, home, self._whole_norms)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_all_reduce(is_last)
        return nullcontext()

    def _update(self, factor: float) -> StepResult:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            assert isinstance(parameter.grad, DTensor)
            self.parts[name].values.grad = parameter.grad.to_local()
            parameter.grad = None
        return self.optimizer.step(factor)


def _rows(parameter: nn.Parameter, mesh: DeviceMesh) -> Part:
    """Return this rank's part of a parameter.

    FSDP2 gives each rank of the mesh ceil(rows / ranks) rows, in order; the last ranks get the remaining rows, or none.
    """
    assert isinstance(parameter, DTensor)
    shape = parameter.shape
    start = mesh.get_local_rank() * -(-shape[0] // mesh.size()) * shape[1:].numel()
    with torch.no_grad():
        return Part(parameter.to_local(), start, shape)
