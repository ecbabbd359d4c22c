"""The reconstruction loss, against materialised targets.

The letters in shapes are those of `case`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimae import kernels
from mimae.bench.ops.cases.case import (
    Bound,
    Case,
    Count,
    Inputs,
    Pass,
    Point,
    Size,
    by_view,
    floats,
    images_and_masks,
    named,
    pick,
    places,
)
from mimae.kernels.pixel_loss import launch_backward, launch_forward


def _prediction_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    shape = (batch, size.views, size.patches - size.visible, 3 * size.patch**2)
    predictions = torch.randn(shape, device=device).to(size.precision)
    weight = torch.full((), size.loss_weight, device=device)
    return {
        **images_and_masks(size, batch, device),
        "predictions": predictions,
        "weight": weight,
        "rescaled": size.loss_weight != 1,
    }


_PREDICTION_ARGUMENTS = ("predictions", "images", "targets", "mean", "std")


def _loss_and_gradient(inputs: Inputs) -> Sequence[Tensor]:
    share = 1 / inputs["targets"].numel()
    arguments = named(inputs, _PREDICTION_ARGUMENTS)
    return launch_forward(**arguments, normalize=True, scale=share, with_gradient=True)


def _finished_gradient(inputs: Inputs) -> Sequence[Tensor]:
    """Return the gradient, which forward has computed. It is written again only if the weight of the loss is not 1."""
    launch_backward(inputs["predictions"], inputs["weight"], 1.0)
    return _rescaled(inputs)


def _rescaled(inputs: Inputs) -> list[Tensor]:
    return [inputs["predictions"]] if inputs["rescaled"] else []


def _prepare_targets(size: Size, inputs: Inputs) -> Inputs:
    """Return inputs for MAE's form, which predicts every patch of a view in image order, with images once per view."""
    _, restore = places(inputs)
    shown = inputs["predictions"].new_zeros(restore.shape[0], size.visible, 3 * size.patch**2)
    predictions = torch.cat([shown, by_view(inputs["predictions"])], 1)
    predictions = predictions.gather(1, restore[:, :, None].expand_as(predictions))
    images = floats(inputs).repeat(size.views, 1, 1, 1)
    return {
        "predictions": predictions,
        "images": images,
        "hidden": restore >= size.visible,
        "patch": size.patch,
        "weight": inputs["weight"],
    }


def _materialised_targets(inputs: Inputs) -> Sequence[Tensor]:
    images, P = inputs["images"], inputs["patch"]
    B, C, H, W = images.shape
    target = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
    target = target.reshape(B, (H // P) * (W // P), P * P * C)
    centre, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - centre) / (variance + 1e-6) ** 0.5
    loss = ((inputs["predictions"].float() - target) ** 2).mean(-1)
    hidden = inputs["hidden"].to(loss.dtype)
    return [(loss * hidden).sum() / hidden.sum()]


def _compare(inputs: Inputs) -> Sequence[Tensor]:
    arguments = named(inputs, _PREDICTION_ARGUMENTS)
    return [kernels.pixel_loss(**arguments, normalize=True, scale=1 / inputs["targets"].numel())]


PIXEL_LOSS = Case(
    op="pixel_loss",
    sizes=(Size("patch 16", 0, 1024), Size("patch 16, weight 1/2", 0, 1024, loss_weight=0.5)),
    inputs=_prediction_inputs,
    passes=(
        Pass(
            "pixel_loss",
            counted=Count((Point(1), Point(2), Point(3))),
            run=_loss_and_gradient,
            reads=pick(*_PREDICTION_ARGUMENTS),
        ),
        Pass(
            "pixel_loss backward",
            counted=Count((Point(1), Point(2), Point(3), Point(5))),
            run=_finished_gradient,
            reads=lambda inputs: [inputs["weight"], *_rescaled(inputs)],
        ),
    ),
    prepare=_prepare_targets,
    eager=_materialised_targets,
    public=_compare,
    bound=Bound(issued=1.1, eager=3),
    trained=("predictions",),
    upstream=("weight",),
)
