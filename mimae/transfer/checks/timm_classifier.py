"""Open this folder with timm alone, and compare its outputs with those stored at its export.

python check.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the logits (B, C) of images uint8 (B, H, W, 3)."""
    model: Any = timm.create_model(f"local-dir:{HERE}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return {"logits": model(pixels).numpy()}
