"""`mimae doctor`: a report of this machine, and of what each part of the system can use.

An installed package may still be broken: any error while it is examined becomes a line of the report.
"""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec

import torch

from mimae import __version__, kernels
from mimae.data.pixels import jpeg
from mimae.engines.zero import files_obstacle
from mimae.kernels import native
from mimae.model import attention
from mimae.optim.adamw import IMPLEMENTATIONS
from mimae.outside.progress import track

Section = dict[str, str]
"""Findings as text, by subject."""

OPS = [
    name
    for name in kernels.__all__
    if callable(op := getattr(kernels, name))
    and (impl := inspect.signature(op).parameters.get("impl"))
    and impl.default == "auto"
]
USABLE = "usable"


def examine() -> dict[str, Section]:
    """Return the report by section. Uses the first GPU if there is one. Errors of packages are reported, not raised."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sections = _sections(device)
    return {title: section() for title, section in track(sections.items(), "examining", len(sections))}


def _sections(device: torch.device) -> dict[str, Callable[[], Section]]:
    return {
        "versions": lambda: {
            "mimae": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "torch is built without it",
            **{package: _version(package) for package in ("triton", "torchvision", "timm")},
        },
        "machine": _machine,
        "ops": lambda: {op: _told(kernels.reason, op, device) for op in OPS},
        "extension": lambda: {
            "mimae._C": _told(_extension),
            "libjpeg-turbo": _told(lambda: jpeg.obstacle() or USABLE),
        },
        "model.attention": lambda: {
            name: _told(_attention, name, device) for name in attention.BACKENDS if name != "auto"
        },
        "optimizer.impl": lambda: {
            name: _told(lambda one: one.obstacle(device) or USABLE, implementation)
            for name, implementation in IMPLEMENTATIONS.items()
            if name != "auto"
        },
        "engine.offload": lambda: {"nvme": _told(lambda: files_obstacle() or USABLE)},
        "packages": lambda: {
            "nvidia.dali": _told(_dali),
            **{package: _version(package) for package in ("deepspeed", "xformers", "apex")},
        },
    }


def _told(ask: Callable[..., str], *about: object) -> str:
    try:
        return ask(*about)
    except Exception as error:  # A broken package can raise anything.
        return f"broken: {_in_a_line(error)}"


def _in_a_line(error: object) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _version(*distributions: str) -> str:
    """Return the version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _machine() -> Section:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    units = torch.backends.cpu.get_cpu_capability()
    machine = {"cpu": f"{cores} cores, {units}, {torch.get_num_threads()} threads in torch"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        machine[f"gpu {i}"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    if not torch.cuda.is_available():
        machine["gpu"] = f"none: {_told(_why_no_gpu)}"
    return machine


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # There is no driver, or torch is built without CUDA.
        return str(error).split(". ")[0]
    return "CUDA sees no device"


def _extension() -> str:
    if not native.LOADED:
        obstacle = native.obstacle(native.OPS[0], torch.device("cpu"))
        return f"{obstacle}; in a checkout, python setup.py build_ext --inplace builds it"
    return f"{USABLE}, built for {' and '.join(native.DEVICES)}"


def _attention(backend: str, device: torch.device) -> str:
    if backend == "xformers" and find_spec("xformers") is None:
        return "not installed"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    obstacle = attention.obstacle(backend, device, dtype, [64])
    notes = [USABLE if obstacle is None else f"cannot train on {device.type}: {obstacle}"]
    if backend == "sdpa" and device.type == "cuda":
        has_flash = torch.backends.cuda.is_flash_attention_available()
        notes.append(f"flash attention is {'' if has_flash else 'not '}in this torch")
    if backend == "xformers":
        failure = getattr(import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
        if failure is not None:
            notes.append(f"its own extension does not load ({_in_a_line(failure)})")
    return "; ".join(notes)


def _dali() -> str:
    version = _version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    if version != "not installed":
        import_module("nvidia.dali")
    return version
