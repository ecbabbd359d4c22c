"""Environment of a run: versions, platform, GPUs, the commit of the checkout."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mimae import __version__

_PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "pillow")


def environment() -> str:
    """Return what a run runs on as JSON: versions, platform, GPUs, the checkout's commit; nobody's names."""
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
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    return json.dumps(facts, indent=2) + "\n"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    """The commit of the checkout at `root` and whether it was changed; None where `root` is no checkout."""
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
        return None  # no git program, or a checkout that it refuses to read
