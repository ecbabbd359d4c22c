"""The cost model (method 7, docs/scaling.md): FLOPs, memory and communication of a recipe, and the advice from them."""

from __future__ import annotations

from mimae.plan.communication import bytes_sent
from mimae.plan.flops import (
    decoder_flops,
    encoder_flops,
    image_flops,
    objective_flops,
    patch_values,
    patches,
    step_flops,
    targets,
    visible,
)
from mimae.plan.gpus import GPU, GPUS, PEAKS, Peak, device_name, find_gpu, peak_flops

__all__ = [
    "GPU",
    "GPUS",
    "PEAKS",
    "Peak",
    "bytes_sent",
    "decoder_flops",
    "device_name",
    "encoder_flops",
    "find_gpu",
    "image_flops",
    "objective_flops",
    "patch_values",
    "patches",
    "peak_flops",
    "step_flops",
    "targets",
    "visible",
]
