"""Fixtures: short runs, whose encoders the tests export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimae.config.load import load_recipe
from mimae.train.tasks.pretrain import pretrain
from tests.data.conftest import write_images

TINY: dict[str, Any] = {
    "precision": "fp32",
    "data": {"image_size": [8, 12], "workers": 0, "loader": "torch", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    "model": {"size": "tiny", "patch_size": 4, "width": 12, "depth": 3, "heads": 2},
    "decoder": {"width": 8, "depth": 1, "heads": 2},
    "masking": {"num_masks": 2, "ratio": 0.5},
    "schedule": {"batch_size": 2, "epochs": 2, "warmup_epochs": 0},
    "optimizer": {"learning_rate": 0.5},
    "ema": {"decay": 0.5},
    "telemetry": {"probe_every_epochs": 0, "images_every_epochs": 0, "trackers": []},
    "checkpoint": {"background": False},
}
"""Settings of images that are not square, with their own mean and deviation, so that a swap fails the tests."""


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Use an empty cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of eleven images in two classes, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder, [f"{'ab'[i % 2]}/{i:02}.png" for i in range(11)], 16, 24)
    (folder / "b/03.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Callable[..., Path]:
    """Return a function that trains a tiny run with overrides, and returns its directory."""

    def make(*overrides: str) -> Path:
        run = tmp_path_factory.mktemp("runs") / "run"
        recipe = load_recipe(TINY, [f"run.dir={run}", f"data.path={images}", "data.max_bad_fraction=1", *overrides])
        assert pretrain(recipe.recipe).finished
        return run

    return make


@pytest.fixture(scope="session")
def run(made: Callable[..., Path]) -> Path:
    """Return the run with default settings."""
    return made()
