"""Open this folder with torch alone, and compare its outputs with those stored at its export.

python check.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
BOUND = 1e-4


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the program gives for images uint8 (B, H, W, 3): tokens, pooled features, maps of blocks."""
    program = torch.export.load(HERE / "model.pt2").module()
    pixels = torch.from_numpy(images)
    if json.loads((HERE / "config.json").read_text())["input"] == "float":
        pixels = pixels.permute(0, 3, 1, 2) / 255
    # One by one and all at once: the batch is dynamic.
    single, several = program(pixels[:1]), program(pixels[1:])
    return {name: torch.cat([single[name], several[name]]).numpy() for name in single}


def differences() -> dict[str, float]:
    """Return the largest absolute difference of each output."""
    stored = np.load(HERE / "check.npz")
    found = outputs(stored["images"])
    return {name: float(np.abs(values - stored[name]).max()) for name, values in found.items()}


if __name__ == "__main__":
    found = differences()
    print("\n".join(f"{name}: differs by {worst:.1e} at most (allowed: {BOUND:.0e})" for name, worst in found.items()))
    sys.exit(not max(found.values()) <= BOUND)
