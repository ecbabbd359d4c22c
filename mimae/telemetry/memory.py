"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def memory(device: torch.device) -> dict[str, int | None]:
    """Return `mem_peak_bytes` and `mem_reserved_bytes` of this process so far.

    On CUDA these are the peaks of the memory of tensors and of the memory that the allocator reserved on `device`. On
    the CPU they are the peak of the process's resident memory, which includes libraries and shared pages, and None.
    """
    if device.type == "cuda":
        return {
            "mem_peak_bytes": torch.cuda.max_memory_allocated(device),
            "mem_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"mem_peak_bytes": peak, "mem_reserved_bytes": None}
