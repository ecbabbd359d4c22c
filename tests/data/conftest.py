"""Fixtures and helpers of the data tests: a separate cache folder, and images that are made in one line."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimae.data.loading.dali import DaliGpuBackend
from mimae.data.loading.loader import Loader, make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

LOADERS = ("torch", "dali_cpu", "dali_gpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder, so that no test sees another test's index or writes to the user's home."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "mimae"


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Return smooth random colours with some noise, uint8 (height, width, 3): neither uniform nor pure noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int64)
    return np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    """Encode pixels as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def write_images(folder: Path, names: list[str], height: int = 24, width: int = 32) -> None:
    """Write one PNG per name, each with different pixels."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(seed, height, width)))


def settle(folder: Path) -> None:
    """Set the modification times of `folder` and everything below it to an hour ago."""
    for path in [folder, *folder.rglob("*")]:
        status = os.stat(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 3_600_000_000_000))


def loader_on_cpu(
    name: str, settings: DataSettings, source: Source, *, seed: int, batch_size: int, **plan: Any
) -> Loader:
    """Return the loader called `name`. For dali_gpu this is the same class and pipeline, on the CPU."""
    if name != "dali_gpu":
        named = settings.model_copy(update={"loader": name})
        return make_loader(named, source, seed=seed, batch_size=batch_size, **plan)
    like = loader_on_cpu("torch", settings, source, seed=seed, batch_size=batch_size, **plan)
    backend = DaliGpuBackend(settings, source, seed, torch.device("cpu"))
    return Loader(like.plan, backend, like._order, like._size_at)
