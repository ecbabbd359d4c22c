"""Settings of the engines."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mimae.config.section import Resume, Section

Compile = Literal["auto", "on", "graphs", "off"]
"""torch.compile of each block; graphs: with CUDA graphs; auto: on with CUDA, except with engine.kind=zero3."""


class EngineSettings(Section):
    """Sharding of the model over ranks. It affects the weights only by rounding, so a resumed run may change it."""

    on_resume: ClassVar[Resume] = "rounding"

    kind: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp: every rank holds the whole model; fsdp: weights, gradients and optimizer are sharded "
        "(torch); zero1: the optimizer is sharded; zero2: gradients too; zero3: weights too (DeepSpeed)",
    )
    replicas: int = Field(
        1,
        ge=1,
        description="fsdp: number of groups of ranks; each group holds the whole model, sharded over its ranks (HSDP); "
        "with one group per node, weights are gathered only inside a node",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: the optimizer is kept in host memory, with fsdp and zero3 the weights too; nvme: zero3's "
        "weights are kept in host memory, its optimizer in files",
    )
    offload_path: Path | None = Field(
        None, description="offload=nvme: a folder on a disk of each machine; it takes 16 bytes per parameter"
    )

    @model_validator(mode="after")
    def _of_this_kind(self) -> EngineSettings:
        if self.replicas > 1 and self.kind != "fsdp":
            raise ValueError(f"replicas is a setting of kind=fsdp, not of kind={self.kind}")
        if self.offload != "none" and self.kind == "ddp":
            raise ValueError("offload needs a kind that shards the optimizer: fsdp, zero1, zero2 or zero3")
        if self.offload == "nvme" and self.kind != "zero3":
            raise ValueError(f"offload=nvme is a setting of kind=zero3, not of kind={self.kind}")
        if (self.offload == "nvme") != (self.offload_path is not None):
            raise ValueError("offload=nvme and offload_path need each other")
        return self
