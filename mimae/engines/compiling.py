"""Compilation of a model's units, each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mimae.engines.settings import Compile
from mimae.model.recomputation import BUDGET
from mimae.model.settings import Checkpointing
from mimae.model.units import Model

RECOMPILE_LIMIT = 8
"""Dynamo's default number of variants of one code that it compiles."""


@dataclass(frozen=True)
class Selective:
    """torch's compiler as a back end that keeps the share `BUDGET` of a unit's activations for its backward.

    In torch the share is a global setting, which dynamo does not look at: with the setting alone, a second model of a
    process would run the code that was compiled for the first one. Dynamo does compare back ends.
    """

    mode: str | None

    def reset(self) -> None:
        """Forget the CUDA graphs; `torch.compiler.reset` calls this."""
        if self.mode is not None:
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Compile a graph."""
        from torch._functorch import config
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        options = list_mode_options(self.mode) if self.mode else None
        with config.patch(activation_memory_budget=BUDGET):
            return compile_fx(graph, inputs, config_patches=options)


def will_compile(setting: Compile, device: torch.device) -> bool:
    """Return True if the setting `compile` compiles units on `device`."""
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")


def compile_units(model: Model, setting: Compile, checkpointing: Checkpointing, device: torch.device) -> None:
    """Compile each unit of a model in place. This comes before sharding, and after checkpointing (around the call)."""
    if not will_compile(setting, device):
        return
    from torch import _dynamo

    # Inside DistributedDataParallel dynamo splits a graph at the ends of DDP's buckets, so that reductions start before
    # the end of a graph's backward. A unit is too small to gain from that: a split unit fuses less and keeps more.
    _dynamo.config.optimize_ddp = False
    # Dynamo counts the variants of a unit's code over all units and all models of the process. Past the limit it would
    # run a unit uncompiled.
    _dynamo.config.recompile_limit += RECOMPILE_LIMIT * model.num_sizes
    _dynamo.config.accumulated_recompile_limit += RECOMPILE_LIMIT * model.num_sizes
    mode = "reduce-overhead" if setting == "graphs" else None
    how: dict[str, Any] = {"backend": Selective(mode)} if checkpointing == "selective" else {"mode": mode}
    for unit in model.units():
        # Sizes do not change in training. But units of different sizes may run the same code (encoder and decoder do).
        # With dynamic shapes torch would treat the second sizes as a change, and compile for variable sizes.
        unit.compile(dynamic=False, **how)
    if setting == "graphs":
        # From here on the outputs that the graphs made in the previous pass may be overwritten.
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
