"""Open this folder with only torch, and compare its outputs with those stored at its export.

Usage: python check.py
"""

import json
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the program's outputs for images uint8 (B, H, W, 3): tokens, pooled features, maps of blocks."""
    program = torch.export.load(HERE / "model.pt2").module()
    pixels = torch.from_numpy(images)
    if json.loads((HERE / "config.json").read_text())["input"] == "float":
        pixels = pixels.permute(0, 3, 1, 2) / 255
    # Two batch sizes test that the batch is dynamic.
    single, several = program(pixels[:1]), program(pixels[1:])
    return {name: torch.cat([single[name], several[name]]).numpy() for name in single}
