"""The optional extension `mimae._C` (csrc/): ops in C++ and CUDA, which are registered in torch when it is loaded."""

from __future__ import annotations

from importlib.util import find_spec

import torch

OPS = ("orthogonal_masks",)
"""Ops in csrc/. Each is registered in torch as mimae::<op>_native."""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPU for which kernels are compiled."""


def _load() -> str | None:
    """Return why the extension cannot be used, or None."""
    spec = find_spec("mimae._C")
    if spec is None or spec.origin is None:
        return "mimae._C is not built"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"mimae._C does not load: {error.__cause__ or error}"
    return None


_missing = _load()

LOADED = _missing is None

DEVICES = [
    device
    for device in ("cpu", "cuda")
    if LOADED and torch._C._dispatch_has_kernel_for_dispatch_key(f"mimae::{OPS[0]}_native", device.upper())
]


def missing() -> str | None:
    """Return the reason for which the extension is not loaded, or None."""
    return _missing


def obstacle(op: str, device: torch.device) -> str | None:
    """Return the reason for which `op` cannot run in C++ or CUDA on a device, or None."""
    if op not in OPS:
        return "it has no such form"
    if _missing is not None:
        return _missing
    if device.type not in DEVICES:
        return f"mimae._C is built for {' and '.join(DEVICES)} alone"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"mimae._C is built for compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} and newer"
    return None
