"""Open this folder with only onnxruntime, and compare its outputs with those stored at its export.

Usage: python check.py
"""

from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the graph's outputs for images uint8 (B, H, W, 3): tokens, pooled features, maps of blocks."""
    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    if wanted.type == "tensor(float)":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    names = [output.name for output in session.get_outputs()]
    # Two batch sizes test that the batch is dynamic.
    single = session.run(names, {wanted.name: images[:1]})
    several = session.run(names, {wanted.name: images[1:]})
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(single, several))}
