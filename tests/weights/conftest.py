"""Fixtures: a small model whose weights all differ, and images to train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.model.mimae import MIMAE, build

Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 noise images, 20 x 20 pixels."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def recipe(images: Path | str, run: Path, *overrides: str, **sections: Any) -> Recipe:
    """Return a run of MAE with two steps: one view, no MI terms."""
    tree = {
        "precision": "fp32",
        "run": {"dir": str(run)},
        "data": {"path": str(images), "image_size": 16, "workers": 0, "loader": "torch"},
        "masking": {"num_masks": 1},
        "model": {"size": "tiny", "patch_size": 4, "width": 24, "depth": 2, "heads": 3},
        "decoder": {"width": 16, "depth": 2, "heads": 2},
        "objective": {"max_mi": 0, "min_mi": 0},
        "schedule": {"batch_size": 8, "epochs": 1, "warmup_epochs": 0, "max_steps": 2},
        "telemetry": {"log_every_steps": 1, "trackers": [], "images_every_epochs": 0},
    }
    return load_recipe(tree, overrides, sections).recipe


def perturbed(model: MIMAE) -> Weights:
    """Return weights of encoder and decoder without initial zeros and ones, with the decoder's positions."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.pos_embed":
            found[name] = tensor
        elif not name.startswith("objective."):
            found[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    return found | {"decoder.pos_embed": model.decoder.pos_embed.clone()}


@pytest.fixture(scope="session")
def weights(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return perturbed(build(recipe(images, tmp_path_factory.mktemp("run"))))


def encoder_of(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
