"""Peak rates of GPUs: matrix products, memory, and the links to their neighbours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from mimae.errors import UserError

if TYPE_CHECKING:
    import torch


class Peak(NamedTuple):
    """Peak rates of dense matrix products of a device, in TFLOP/s; None if it has no units for the format."""

    bf16: float | None
    tf32: float | None
    fp32: float


# Sources: the vendor's data sheets and architecture papers. Rates are dense (no sparsity), with accumulation in fp32,
# at boost clock. The first pattern that matches the name of a device counts.
PEAKS = {
    r"\bGB200\b": Peak(2500, 1250, 80),
    r"\bB200\b": Peak(2250, 1100, 75),
    r"\bH[12]00 NVL\b": Peak(835, 417, 60),
    r"\bH100 PCIe\b": Peak(756, 378, 51),
    r"\b(H100|H200|GH200)\b": Peak(989, 494, 67),
    r"\bA100\b": Peak(312, 156, 19.5),
    r"\bA40\b": Peak(149.7, 74.8, 37.4),
    r"\bA10\b": Peak(125, 62.5, 31.2),
    r"\bL40S\b": Peak(362, 183, 91.6),
    r"\bL40\b": Peak(181, 90.5, 90.5),
    r"\bL4\b": Peak(121, 60, 30.3),
    r"\bRTX A6000\b": Peak(154.8, 77.4, 38.7),
    r"\bRTX 5090$": Peak(209.5, 104.8, 104.8),
    r"\bRTX 4090$": Peak(165.2, 82.6, 82.6),
    r"\bRTX 3090$": Peak(71, 35.6, 35.6),
    r"\bV100S?-PCIE\b": Peak(None, None, 14),
    r"\bV100\b": Peak(None, None, 15.7),
}


class GPU(NamedTuple):
    """A GPU to plan for, in its most common machine."""

    name: str
    """Name as torch reports it."""
    memory: float
    """Memory in GiB as torch reports it, rounded down."""
    link: float
    """GB/s that it can send to the other GPUs of its node, by NVLink or PCIe."""
    network: float
    """GB/s that it can send to other nodes: the rate of the node's network cards, divided among its GPUs."""


# Rates from the vendors' data sheets, nominal and in one direction: NVLink 4, 3 and 2 (450, 300, 150), NVLink 5 (900),
# PCIe 5 and 4 (64, 32). Network cards: one per GPU of 400 Gb/s (DGX H100, DGX B200), 200 Gb/s (DGX A100), half of 100
# Gb/s (DGX-1); cards on PCIe: 200 Gb/s for a node of 8.
GPUS = {
    "gb200": GPU("NVIDIA GB200", 184, 900, 50),
    "b200": GPU("NVIDIA B200", 178, 900, 50),
    "gh200": GPU("NVIDIA GH200 480GB", 94, 450, 50),
    "h200": GPU("NVIDIA H200", 139, 450, 50),
    "h200-nvl": GPU("NVIDIA H200 NVL", 139, 64, 3.1),
    "h100": GPU("NVIDIA H100 80GB HBM3", 79, 450, 50),
    "h100-nvl": GPU("NVIDIA H100 NVL", 93, 64, 3.1),
    "h100-pcie": GPU("NVIDIA H100 PCIe", 79, 64, 3.1),
    "a100": GPU("NVIDIA A100-SXM4-80GB", 79, 300, 25),
    "a100-40gb": GPU("NVIDIA A100-SXM4-40GB", 39, 300, 25),
    "a40": GPU("NVIDIA A40", 44, 32, 3.1),
    "a10": GPU("NVIDIA A10", 22, 32, 3.1),
    "l40s": GPU("NVIDIA L40S", 44, 32, 3.1),
    "l40": GPU("NVIDIA L40", 44, 32, 3.1),
    "l4": GPU("NVIDIA L4", 22, 32, 3.1),
    "a6000": GPU("NVIDIA RTX A6000", 47, 32, 3.1),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", 31, 64, 3.1),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 23, 32, 3.1),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 23, 32, 3.1),
    "v100": GPU("Tesla V100-SXM2-32GB", 31, 150, 6.2),
    "v100-pcie": GPU("Tesla V100-PCIE-32GB", 31, 16, 3.1),
}
"""GPUs by their names in `mimae plan --gpu`."""


def find_gpu(name: str) -> GPU:
    """Return a GPU by its short name, or by torch's name for it. Raises UserError with the legal names."""
    for short, gpu in GPUS.items():
        if name.lower() in (short, gpu.name.lower()):
            return gpu
    raise UserError(f"--gpu {name}: no such GPU is known here; legal is {', '.join(GPUS)}")


def device_name(device: torch.device) -> str:
    """Return the common name of a device, which PEAKS uses."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device for matrix products in `precision` (fp32 or bf16), or None if unknown.

    fp32 products that run in TF32 (`torch.set_float32_matmul_precision`) have TF32's peak.
    """
    # A slice of a GPU and a laptop GPU of the same name are different devices.
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    peak = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device_name)), None)
    if peak is None:
        return None
    if precision == "bf16":
        tera = peak.bf16
    else:
        import torch

        exact = torch.get_float32_matmul_precision() == "highest" or peak.tf32 is None
        tera = peak.fp32 if exact else peak.tf32
    return None if tera is None else tera * 1e12
