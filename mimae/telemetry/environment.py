"""Environment of a run: versions, platform, GPUs with their driver and clocks, the commit of the checkout."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mimae import __version__

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")

_PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "pillow")


def environment() -> str:
    """Return the environment of a run as JSON: versions, platform, GPUs and the checkout's commit; no user names."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts = {
        "mimae": __version__,
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        **gpu_facts(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    return json.dumps(facts, indent=2) + "\n"


def gpu_facts() -> dict[str, Any]:
    """Return the versions of driver and NCCL, and the clocks and power limits of the GPUs as nvidia-smi prints them.

    All are None where there is no GPU, or no nvidia-smi that answers.
    """
    if not torch.cuda.is_available():
        return {"driver": None, "nccl": None, "gpu_clocks": None}
    rows = [line.split(", ") for line in _nvidia_smi(("driver_version", *_CLOCKS))]
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "driver": rows[0][0] if rows else None,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "gpu_clocks": [dict(zip(_CLOCKS, row[1:])) for row in rows] or None,
    }


def _nvidia_smi(fields: Sequence[str]) -> list[str]:
    """Return a line for each GPU of the machine; none where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout at `root` and whether it has changes, or None if `root` is not a checkout."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None  # There is no git program, or it refuses to read the checkout.
