"""Open this folder with only timm, and compare its outputs with those stored at its export.

Usage: python check.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return tokens (B, 1 + L, D) and pooled features (B, D) of images uint8 (B, H, W, 3)."""
    model: Any = timm.create_model(f"local-dir:{HERE}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return {"tokens": model.forward_features(pixels).numpy(), "features": model(pixels).numpy()}
