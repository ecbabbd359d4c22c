"""Open this folder with only transformers, and compare its outputs with those stored at its export.

Usage: python check.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return tokens (B, 1 + L, D) and pooled features (B, D) of images uint8 (B, H, W, 3)."""
    model = AutoModel.from_pretrained(HERE, add_pooling_layer=False).float().eval()
    config = json.loads((HERE / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("image_mean", "image_std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        tokens = model(pixel_values=pixels).last_hidden_state
    return {"tokens": tokens.numpy(), "features": tokens[:, 1:].mean(1).numpy()}
