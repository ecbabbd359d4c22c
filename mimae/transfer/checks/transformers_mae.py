"""Open this folder with only transformers, and compare its outputs with those stored at its export.

Usage: python check.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import ViTMAEForPreTraining

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs for images uint8 (B, H, W, 3).

    tokens (B, 1 + L, D) and features (B, D) are those of whole images. predictions (B, M, 3P^2) and the loss are those
    of the decoder if only the quarter of the patches with the least noise is visible.
    """
    model = ViTMAEForPreTraining.from_pretrained(HERE).float().eval()
    config = json.loads((HERE / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("image_mean", "image_std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    patches = (pixels.shape[2] // model.config.patch_size) ** 2
    in_order = torch.arange(patches, dtype=torch.float32).expand(len(pixels), -1)
    stored = np.load(HERE / "check.npz")
    with torch.no_grad():
        model.config.mask_ratio = 0.0
        tokens = model.vit(pixel_values=pixels, noise=in_order).last_hidden_state
        model.config.mask_ratio = 0.75
        decoded = model(pixel_values=pixels, noise=torch.from_numpy(stored["noise"]))
    hidden = torch.from_numpy(stored["hidden"])[..., None].expand(-1, -1, decoded.logits.shape[2])
    predictions = decoded.logits.gather(1, hidden)
    return {
        "tokens": tokens.numpy(),
        "features": tokens[:, 1:].mean(1).numpy(),
        "predictions": predictions.numpy(),
        "loss": decoded.loss.numpy(),
    }
