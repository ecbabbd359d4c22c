"""Description of the machine of a benchmark: its name, the versions in use, its measured matrix rate."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimae.telemetry.environment import gpu_facts
from mimae.telemetry.memory import memory

PACKAGES = ("mimae", "torch", "timm", "triton", "transformers", "lightly", "numpy", "deepspeed")


def describe(device: torch.device) -> dict[str, Any]:
    """Return the head of every result file: `date`, `machine` and `versions`, without names of users or hosts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "gpu": None,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        machine |= gpu_facts()
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine, "versions": versions}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def process_age() -> float:
    """Return the seconds since this process was started: imports count too. Zero where there is no /proc."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(field: str) -> int:
    """Return VmRSS (present) or VmHWM (peak) of this process. getrusage's peak would include the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return memory(torch.device("cpu"))["mem_peak_bytes"] or 0
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024  # type: ignore[index]


def resident_peak(run: Callable[[], object]) -> int | None:
    """Return the largest growth of this process's memory during `run`, in bytes, or None if it is unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # This resets the peak.
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Product(NamedTuple):
    """A number of layers, `layers`, that multiply (rows, inner) by (inner, columns)."""

    rows: int
    inner: int
    columns: int
    layers: int = 1


def matmul_rate(products: Iterable[Product], dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of layers: forward and both products of backward, each at its best measured time.

    Each product is repeated for `seconds`, at least twice.
    """
    flops = total = 0.0
    for rows, inner, columns, layers in products:
        x = torch.randn(rows, inner, dtype=dtype, device=device)
        weight = torch.randn(columns, inner, dtype=dtype, device=device)
        grad = torch.randn(rows, columns, dtype=dtype, device=device)
        for left, right in ((x, weight.T), (grad, weight), (grad.T, x)):
            flops += layers * 2.0 * rows * inner * columns
            total += layers * _best_time(left, right, device, seconds)
    return flops / total


def _best_time(left: torch.Tensor, right: torch.Tensor, device: torch.device, seconds: float) -> float:
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
