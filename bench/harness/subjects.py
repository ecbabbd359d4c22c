"""The tiny runs of the drill, one for each task, with their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGES = 100

_SHARED = """
precision: fp32
model: {{size: tiny, patch_size: 2, width: 16, depth: 1, heads: 2, attention: sdpa}}
ema: {{decay: 0.5}}
checkpoint: {{every_steps: {every}}}
telemetry: {{log_every_steps: 1, probe_every_epochs: 0, images_every_epochs: 0, trackers: []}}
"""

_PRETRAIN = """
data: {{path: {images}, image_size: 8, workers: 0, loader: torch}}
decoder: {{width: 8, depth: 1, heads: 2}}
objective: {{projector: mlp, gate_loss: 5.0, posterior_width: 4}}
optimizer: {{learning_rate: 0.1, clip: 1.0}}
schedule: {{batch_size: 24, epochs: 5, warmup_epochs: 1, accumulate: 2, max_steps: {steps}}}
"""

_CLASSIFY = """
task: classify
data: {{path: {images}, image_size: 8, crop_scale: [0.5, 1.0], workers: 0, loader: torch}}
finetune: {{layer_decay: 0.75, drop_path: 0.2}}
augment: {{rand_augment: 9, erase: 0.25, mixup: 0.8, cutmix: 1.0, mix: 0.5, label_smoothing: 0.1}}
optimizer: {{learning_rate: 0.01, scale_by: none, betas: [0.9, 0.999], clip: 1.0}}
schedule: {{batch_size: 24, epochs: 5, warmup_epochs: 1, max_steps: {steps}}}
"""

_SEGMENT = """
task: segment
data: {{path: {images}, image_size: 8, workers: 0, loader: torch}}
segment: {{masks: {data}/masks, classes: 3, head: upernet, blocks: [0, 0, 0, 0], width: 8}}
finetune: {{layer_decay: 0.75, drop_path: 0.2}}
optimizer: {{learning_rate: 0.01, scale_by: none, betas: [0.9, 0.999], clip: 1.0}}
schedule: {{batch_size: 24, epochs: 5, warmup_epochs: 1, accumulate: 2, max_steps: {steps}}}
"""


class Subject(NamedTuple):
    """A task's run. It uses every part with state. Batches of 24 divide by 1, 2, 3 and 4 ranks."""

    verb: str
    """Command that trains it."""
    settings: str
    write: Callable[[Path], None]
    """Writes its data to a folder: PNG files in and below `images`, and what belongs to them beside it."""

    def recipe(self, images: Path, data: Path, steps: int, every: int) -> str:
        """Return the recipe of a run with so many steps and a checkpoint after `every` steps."""
        return (_SHARED + self.settings).format(images=images, data=data, steps=steps, every=every)


def _noise(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        _save(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8), folder / "images" / f"{i:03}.png")


def _two_classes(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = generator.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(128 * (i % 2))
        _save(pixels, folder / "images" / "ab"[i % 2] / f"{i:03}.png")


def _masks(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        classes = generator.integers(0, 3, (4, 4), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        noise = generator.integers(0, 80, (16, 16, 3), dtype=np.uint8)
        _save(classes[..., None] * np.uint8(80) + noise, folder / "images" / f"{i:03}.png")
        _save(classes, folder / "masks" / f"{i:03}.png")


def _save(pixels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


SUBJECTS = {
    "pretrain": Subject("pretrain", _PRETRAIN, _noise),
    "classify": Subject("finetune", _CLASSIFY, _two_classes),
    "segment": Subject("segment", _SEGMENT, _masks),
}
"""Runs by task. Detection is not among them: what its samplers draw depends on the number of ranks."""
