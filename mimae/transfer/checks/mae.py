"""Open this folder with only torch, and compare its outputs with those stored at its export.

Usage: python check.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimae.transfer.checks.vit import vit

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return tokens (B, 1 + L, D) and pooled features (B, D) of images uint8 (B, H, W, 3)."""
    config: dict[str, Any] = json.loads((HERE / "config.json").read_text())["mimae"]
    weights = torch.load(HERE / "model.pth", weights_only=True)["model"]
    return vit(images, {name: tensor.float() for name, tensor in weights.items()}, config)
