"""The kinds of operators that the time of a step is spent on."""

from __future__ import annotations

import os
import re

from torch.profiler import ProfilerActivity, profile

from mimae.bench.step.contenders import Contender

KINDS = {
    "optimizer": r"adamw|Optimizer|vector_norm|_foreach_norm",
    "attention": r"attention|softmax",
    "matmul": r"::(addmm|mm|bmm|baddbmm|linear|matmul|einsum)$|mkldnn|conv",
    "norm": r"layer_norm",
    "copies": r"copy_|::(clone|cat|stack|gather|scatter|repeat|roll|index|sort|contiguous)|slice_backward",
    "elementwise": r"gelu|::(add|sub|mul|div|exp|pow|neg|r?sqrt|addcmul|sum|mean|var|var_mean|fill|zero)_?$",
}
"""Groups of operators in the profile: the first pattern in an operator's name decides, otherwise `other`."""


def time_by_kind(contender: Contender) -> dict[str, float]:
    """Return the shares of one step's operator time by kind (KINDS), on the GPU if there is one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler complains on stderr without a GPU.
    on_cuda = contender.images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        contender.timed(1)
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.device_type.name != "CPU":
            continue  # This is a kernel, whose time is included in its operator's.
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        shares[kind] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in shares.items()}
