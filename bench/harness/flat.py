"""A run of thousands of tiny steps: memory, descriptors and threads stay, records grow by the same bytes a step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimae.bench.data.data import tree_bytes
from mimae.config.load import load_recipe
from mimae.train.tasks.pretrain import pretrain
from mimae.train.trainer import Trainer

EVERY = 50
"""Steps between two looks."""

STEPS_PER_EPOCH = 50

MEMORY_MIB = 4.0
"""Growth of the medians from the second to the last quarter that is still flat: allocators keep what they had once."""

RECIPE = """
precision: fp32
data: {path: images, val_path: images, image_size: 8, workers: 1, loader: torch}
model: {size: tiny, patch_size: 2, width: 16, depth: 1, heads: 2}
decoder: {width: 8, depth: 1, heads: 2}
objective: {projector: mlp, gate_loss: 5.0, posterior_width: 4}
schedule: {batch_size: 8, epochs: 100000, warmup_epochs: 1, max_steps: %d}
ema: {decay: 0.5}
checkpoint: {every_steps: 100}
telemetry: {log_every_steps: 1, probe_every_epochs: 5, images_every_epochs: 10}
"""
"""A worker, checkpoints, validation, the probe, pictures and TensorBoard are in use."""


def flat(steps: int, folder: Path) -> dict[str, Any]:
    """Train `steps` steps in this process; return what was seen of it every EVERY steps, and by quarters."""
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(8 * STEPS_PER_EPOCH):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"images/{i:03}.png")
    (folder / "recipe.yaml").write_text(RECIPE % steps)
    run = folder / "run"
    paths = {"data": {"path": str(folder / "images"), "val_path": str(folder / "images")}, "run": {"dir": str(run)}}
    seen: list[list[float]] = []
    optimize = Trainer.optimize

    def watched(self: Any) -> Any:
        if self.step % EVERY == 0:
            seen.append([self.step, *_look(run)])
        return optimize(self)

    Trainer.optimize = watched  # type: ignore[method-assign]
    try:
        pretrain(load_recipe(folder / "recipe.yaml", (), paths).recipe)
    finally:
        Trainer.optimize = optimize  # type: ignore[method-assign]
    return summary(np.array(seen)) | {"steps": steps, "columns": list(_COLUMNS), "seen": seen}


_COLUMNS = ("step", "memory_mib", "descriptors", "threads", "bytes_of_records", "bytes_of_tensorboard")


def _look(run: Path) -> tuple[float, ...]:
    records = sum(file.stat().st_size for file in run.glob("*.jsonl"))
    curves = sum(file.stat().st_size for file in (run / "tensorboard").glob("events.*"))
    descriptors, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return round(tree_bytes() / 2**20, 1), descriptors, threads, records, curves


def summary(seen: np.ndarray) -> dict[str, Any]:
    """Return medians by quarter of the steps, and whether they are flat."""
    quarters = np.array_split(seen, 4)
    found: dict[str, Any] = {
        name: [float(np.median(part[:, column])) for part in quarters]
        for column, name in enumerate(_COLUMNS[:4])
        if column
    }
    for column in (4, 5):
        rates = [(part[-1, column] - part[0, column]) / (part[-1, 0] - part[0, 0]) for part in quarters]
        found[f"{_COLUMNS[column]}_a_step"] = [round(float(rate), 1) for rate in rates]
    _, second, _, last = found["memory_mib"]
    is_flat = last - second <= MEMORY_MIB
    is_flat &= all(found[name][1] >= found[name][3] for name in ("descriptors", "threads"))
    for column in (4, 5):
        _, first, *others = found[f"{_COLUMNS[column]}_a_step"]
        is_flat &= all(abs(other - first) <= 0.05 * first for other in others)
    return found | {"flat": bool(is_flat)}
