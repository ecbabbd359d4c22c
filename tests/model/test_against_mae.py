"""Tests that without MI terms the model is MAE: the loss and all gradients equal an independent oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimae.data.settings import DataSettings
from mimae.model.geometry import Grid
from mimae.model.masking import draw, targets
from mimae.model.mimae import MIMAE
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings, Predict
from mimae.objective.settings import ObjectiveSettings
from tests.oracles.mae_oracle import mae_loss

HEADS, DECODER_HEADS, PATCH = 3, 2, 4
BATCH = 3  # The size is odd and differs from all other sizes here.


def make(image_size: tuple[int, int], views: int, normalize: bool = True, **decoder: Any) -> MIMAE:
    """Return a small float64 model in which no parameter has its initial zeros and ones."""
    torch.manual_seed(0)
    model = MIMAE(
        DataSettings(image_size=image_size),
        MaskingSettings(num_masks=views, ratio=0.75),
        ModelSettings(patch_size=PATCH, width=24, depth=2, heads=HEADS),
        DecoderSettings(width=16, depth=2, heads=DECODER_HEADS, **decoder),
        ObjectiveSettings(max_mi=0, min_mi=0, normalize_pixels=normalize),
    ).double()
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, scale)
    return model


def oracle(
    model: MIMAE, images: Tensor, visible: Tensor, predicted: list[Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of the oracle's loss over views, and its gradient by the name of the parameter."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = [
        mae_loss(
            weights,
            images,
            visible[:, view],
            patch=PATCH,
            heads=HEADS,
            decoder_heads=DECODER_HEADS,
            mean=model.encoder.mean.tolist(),
            std=model.encoder.std.tolist(),
            normalize=model.objective.settings.normalize_pixels,
            targets=None if predicted is None else predicted[view],
            cross=model.decoder.is_cross,
        )
        for view in range(visible.shape[1])
    ]
    loss = torch.stack(losses).mean()
    return loss.detach(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


@pytest.mark.parametrize(
    ("image_size", "views", "normalize", "decoder"),
    [
        pytest.param((16, 16), 1, True, {}, id="MAE"),
        pytest.param((16, 16), 1, False, {}, id="raw pixels"),
        pytest.param((12, 20), 1, True, {}, id="rows and columns differ"),
        pytest.param((16, 16), 3, True, {}, id="the mean over orthogonal views"),
        pytest.param((16, 16), 3, True, {"predict": "next_view"}, id="the next view's patches"),
        pytest.param((12, 20), 1, True, {"attention": "cross"}, id="cross attention, one view"),
        pytest.param((16, 16), 3, True, {"attention": "cross", "predict": "next_view"}, id="both"),
    ],
)
def test_loss_and_gradients(
    image_size: tuple[int, int], views: int, normalize: bool, decoder: dict[str, Predict]
) -> None:
    model = make(image_size, views, normalize, **decoder)
    images = torch.randint(0, 256, (BATCH, *image_size, 3), dtype=torch.uint8)
    masking = MaskingSettings(num_masks=views, ratio=0.75)
    visible, hidden = draw(masking, 1, 0, torch.arange(BATCH), model.encoder.grid)

    predict = decoder.get("predict", "hidden")
    loss = model(images, visible, targets(predict, visible, hidden)).loss
    loss.backward()

    by_hand = [visible[:, (view + 1) % views] for view in range(views)] if predict == "next_view" else None
    expected, gradients = oracle(model, images, visible, by_hand)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient, error = gradients[name], torch.dist(parameter.grad, gradients[name])
        assert gradient.norm() > 1e-6, f"{name}: the oracle's gradient says nothing"
        assert error <= 1e-10 * gradient.norm(), f"{name}: off by {error / gradient.norm():.1e} of its norm"


def test_shown_order_does_not_matter() -> None:
    model = make((16, 16), 1)
    images = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8)
    visible, hidden = draw(MaskingSettings(num_masks=1), 1, 0, torch.arange(BATCH), Grid(4, 4, PATCH))
    loss = model(images, visible, hidden).loss
    shuffled = model(images, visible.flip(2), hidden.roll(3, 2)).loss
    assert loss.item() == pytest.approx(shuffled.item(), rel=1e-12)
