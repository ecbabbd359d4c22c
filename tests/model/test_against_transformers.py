"""Tests that without MI terms the model equals the MAE of transformers: equal losses for equal weights and ids."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mimae.bench.baselines.peers import TransformersMAE, noise_of
from mimae.config.recipe import Recipe
from mimae.data.settings import DataSettings
from mimae.model.masking import draw
from mimae.model.mimae import MIMAE, build
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.objective.settings import ObjectiveSettings
from tests.rounding import DRAWS, excess, nudge

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("dtype", "normalize", "ratio"),
    [
        pytest.param(torch.float64, True, 0.75, id="float64"),
        # 0.6 of 16 patches keeps 6 by rounding and 6 by transformers' truncation of 6.4: both round down.
        pytest.param(torch.float64, False, 0.6, id="raw pixels and another ratio"),
        pytest.param(torch.float32, True, 0.75, id="float32"),
    ],
)
def test_loss_and_gradients(dtype: torch.dtype, normalize: bool, ratio: float) -> None:
    """They are equal up to rounding in each dtype; in float64 that is about 1e-14."""
    recipe = Recipe(
        data=DataSettings(image_size=16),
        masking=MaskingSettings(num_masks=1, ratio=ratio),
        model=ModelSettings(patch_size=4, width=24, depth=2, heads=3),
        decoder=DecoderSettings(width=16, depth=1, heads=2),
        objective=ObjectiveSettings(max_mi=0, min_mi=0, normalize_pixels=normalize),
    )
    torch.manual_seed(0)
    ours = build(recipe)
    # The weights differ from the initial zeros and ones, which would hide a bias in the wrong place.
    for parameter in ours.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    theirs = TransformersMAE(recipe)
    theirs.load(ours.state_dict())  # Positions are left out, because each model computes them.
    ours, theirs = ours.to(dtype), theirs.to(dtype)

    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    visible, hidden = draw(recipe.masking, 0, 0, torch.arange(3), ours.encoder.grid)
    pixels = ((images.to(dtype) / 255 - ours.encoder.mean) / ours.encoder.std).permute(0, 3, 1, 2)

    pairs = {
        "encoder.cls_token": "vit.embeddings.cls_token",
        "encoder.patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "encoder.blocks.0.mlp.fc1.weight": "vit.layers.0.mlp.fc1.weight",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.head.bias": "decoder.decoder_pred.bias",
    }

    def gradients(model: MIMAE) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(images, visible, hidden).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: model.get_parameter(name).grad.clone() for name in pairs}

    expected = theirs(pixels, noise_of(visible, 16))
    expected.backward()
    wanted = {"loss": expected.detach()} | {n: theirs.mae.get_parameter(their).grad for n, their in pairs.items()}
    found, nudged = gradients(ours), []
    for number in range(DRAWS):
        moved = copy.deepcopy(ours)
        nudge(moved.parameters(), number, dtype)
        nudged.append(gradients(moved))
    assert excess(wanted, found, nudged) < 1
    assert excess({name: 1.001 * value for name, value in wanted.items()}, found, nudged) > 1
