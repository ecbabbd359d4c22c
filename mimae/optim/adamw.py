"""Implementations of AdamW: torch's, NVIDIA apex's, DeepSpeed's.

Each reads the decision to skip a step on the device, without a wait of the host. The state has torch's form, by
parameter: `step` (a scalar in fp32: the steps taken), `exp_avg` and `exp_avg_sq`. So a run can continue with another
implementation.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimae.optim.stepper import ParamGroup, Stepper


class AdamW(Stepper):
    """Base class of the implementations of AdamW."""

    kinds = ("step", "exp_avg", "exp_avg_sq")

    @abstractmethod
    def __init__(self, groups: Sequence[ParamGroup], betas: tuple[float, float], device: torch.device) -> None:
        """Make the optimizer. `device` is the device of the parameters when they are stepped."""


class TorchAdamW(AdamW):
    """torch's fused kernels, on CPU and GPU."""

    def __init__(self, groups: Sequence[ParamGroup], betas: tuple[float, float], device: torch.device) -> None:
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        return None

    def step(self, skipped: Tensor) -> None:
        # This is the kernels' protocol for GradScaler: they return without a change if `found_inf` is 1.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()


class ApexAdamW(AdamW):
    """FusedAdam of NVIDIA's apex in its capturable form, which keeps the count of steps on the device."""

    def __init__(self, groups: Sequence[ParamGroup], betas: tuple[float, float], device: torch.device) -> None:
        self.optimizer = import_module("apex.optimizers").FusedAdam(groups, betas=betas, capturable=True)
        for group in self.optimizer.param_groups:
            group["step"] = torch.zeros(1, dtype=torch.int, device=device)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        spec = find_spec("apex")
        if spec is None:
            return "apex is not installed; it is built from NVIDIA's source (the package on PyPI is a different one)"
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        if not any((folder / "optimizers/fused_adam.py").exists() for folder in folders):
            return "the installed apex is not NVIDIA's, which is built from source and is not on PyPI"
        if device.type != "cuda":
            return "its FusedAdam needs a CUDA device"
        try:
            import_module("amp_C")
        except ImportError as error:
            return f"apex is installed without its CUDA extensions: {error}"
        return None

    def set_rate(self, group: ParamGroup, rate: float) -> None:
        group["lr"] = torch.full((), rate, device=group["step"].device)

    def step(self, skipped: Tensor) -> None:
        # It counts a step unless this flag is set. It sets the flag group by group from the scaler; here all groups get
        # it.
        self.optimizer._dummy_overflow_buf.copy_(skipped)  # type: ignore[attr-defined]
        self.optimizer.step(grad_scaler=_Verdict(skipped))  # type: ignore[call-overload]

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return {
            p: self.optimizer.state[p] | {"step": group["step"][0].float()}
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p in self.optimizer.state
        }

    def load(self, state: dict[Tensor, dict[str, Any]]) -> None:
        for group in self.optimizer.param_groups:
            group["step"].copy_(state[group["params"][0]]["step"])
        super().load({p: {k: v for k, v in kinds.items() if k != "step"} for p, kinds in state.items()})


class _Verdict:
    """Stand-in for a GradScaler with the methods that FusedAdam calls: if gradients are not finite, and their scale."""

    def __init__(self, skipped: Tensor) -> None:
        self.skipped = skipped

    def _check_inf_per_device(self, _: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.skipped.device: self.skipped}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.skipped)


class DeepSpeedAdamW(AdamW):
    """DeepSpeedCPUAdam for weights on the host, and DeepSpeed's FusedAdam for weights on a GPU.

    Both count steps on the host, so `step` waits for the decision about a step.
    """

    def __init__(self, groups: Sequence[ParamGroup], betas: tuple[float, float], device: torch.device) -> None:
        kind = "DeepSpeedCPUAdam" if device.type == "cpu" else "FusedAdam"
        self.optimizer = getattr(import_module("deepspeed.ops.adam"), kind)(groups, betas=betas)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        if find_spec("deepspeed") is None:
            return "deepspeed is not installed"
        op = "cpu_adam" if device.type == "cpu" else "fused_adam"
        if not has_op(op):
            return f"its {op} is not built; install deepspeed with DS_BUILD_{op.upper()}=1, which takes minutes"
        return None

    def step(self, skipped: Tensor) -> None:
        if not skipped:
            self.optimizer.step()

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return {p: {**kinds, "step": torch.tensor(float(kinds["step"]))} for p, kinds in super().state().items()}

    def load(self, state: dict[Tensor, dict[str, Any]]) -> None:
        super().load({p: {**kinds, "step": int(kinds["step"])} for p, kinds in state.items()})


def has_op(name: str) -> bool:
    """Return whether DeepSpeed was built with an op; its first use would build it, silently and for minutes."""
    os.environ.setdefault(
        "DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"
    )  # Else it guesses and prints.
    built = import_module("deepspeed.git_version_info")
    here = import_module("deepspeed.accelerator").get_accelerator().device_name()
    return bool(built.installed_ops.get(name)) and built.accelerator_name == here


IMPLEMENTATIONS: dict[str, type[AdamW]] = {
    "auto": TorchAdamW,
    "torch": TorchAdamW,
    "apex": ApexAdamW,
    "deepspeed": DeepSpeedAdamW,
}
