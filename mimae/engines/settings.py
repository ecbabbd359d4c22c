"""Settings of the engines."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mimae.config.section import Resume, Section

Compile = Literal["auto", "on", "graphs", "off"]
"""torch.compile of each block, `graphs` with CUDA graphs; auto: on with CUDA, but for engine.kind=zero3."""


class EngineSettings(Section):
    """Spreading of the model over ranks. Weights depend on it by rounding only, so a resumed run may change it."""

    on_resume: ClassVar[Resume] = "rounding"

    kind: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp: every rank holds the whole model; fsdp: weights, gradients and optimizer are spread (torch); "
        "zero1, zero2, zero3: the optimizer, gradients too, weights too (DeepSpeed)",
    )
    replicas: int = Field(
        1,
        ge=1,
        description="fsdp: groups of ranks with the whole model in each, spread inside (HSDP); as many as nodes keep "
        "the gathering of weights inside a node",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: the optimizer lives in host memory; fsdp, zero3: weights too; nvme: zero3's weights live in "
        "host memory, its optimizer in files",
    )
    offload_path: Path | None = Field(
        None, description="offload=nvme: a folder on a disk of each machine, for 16 bytes of every parameter"
    )

    @model_validator(mode="after")
    def _of_this_kind(self) -> EngineSettings:
        if self.replicas > 1 and self.kind != "fsdp":
            raise ValueError(f"replicas is a setting of kind=fsdp, not of kind={self.kind}")
        if self.offload != "none" and self.kind == "ddp":
            raise ValueError("offload needs a kind that spreads the optimizer: fsdp, zero1, zero2 or zero3")
        if self.offload == "nvme" and self.kind != "zero3":
            raise ValueError(f"offload=nvme is a setting of kind=zero3, not of kind={self.kind}")
        if (self.offload == "nvme") != (self.offload_path is not None):
            raise ValueError("offload=nvme and offload_path need each other")
        return self
