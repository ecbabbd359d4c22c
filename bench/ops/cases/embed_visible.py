"""Normalisation, projection and gather of the visible patches, against a convolution of whole images.

The letters in shapes are those of `case`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimae import kernels
from mimae.bench.ops.cases.case import (
    MODELS,
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
from mimae.kernels.embed_visible import launch_backward, launch_forward


def _embedding_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    features, width = 3 * size.patch**2, size.width
    return {
        **images_and_masks(size, batch, device),
        "weight": torch.randn(width, 3, size.patch, size.patch, device=device) / features**0.5,
        "bias": torch.randn(width, device=device),
        "pos": torch.randn(1 + size.patches, width, device=device),
        "cls": torch.randn(width, device=device),
        # Positions in fp32 make the tokens fp32.
        "d_tokens": torch.randn(batch, size.views, 1 + size.visible, width, device=device),
        "product": size.precision,
    }


_EMBEDDING_ARGUMENTS = ("images", "visible", "weight", "bias", "pos", "cls", "mean", "std")


def _embedding_gradients(inputs: Inputs) -> Sequence[Tensor]:
    arguments = named(inputs, ("d_tokens", "images", "visible", "mean", "std", "product"))
    d_weight, d_bias = launch_backward(**arguments, patch=inputs["weight"].shape[-1])
    return d_weight, d_bias, inputs["d_tokens"][:, :, 0].sum((0, 1))


def _projection_flops(size: Size, batch: int) -> float:
    return 2.0 * batch * size.views * size.visible * 3 * size.patch**2 * size.width


def _prepare_convolution(size: Size, inputs: Inputs) -> Inputs:
    keep, _ = places(inputs)
    as_is = named(inputs, ("weight", "bias", "pos", "cls", "product"))
    return {**as_is, "images": floats(inputs), "keep": keep, "d_tokens": by_view(inputs["d_tokens"])}


def _convolution(inputs: Inputs) -> Sequence[Tensor]:
    weight, keep, pos = inputs["weight"], inputs["keep"], inputs["pos"]
    images = inputs["images"].repeat(keep.shape[0] // inputs["images"].shape[0], 1, 1, 1)
    with torch.autocast(images.device.type, inputs["product"], enabled=inputs["product"] != weight.dtype):
        patches = F.conv2d(images, weight, inputs["bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    tokens = torch.gather(patches + pos[1:], 1, keep[:, :, None].expand(-1, -1, weight.shape[0]))
    return [torch.cat([(inputs["cls"] + pos[0]).expand(keep.shape[0], 1, -1), tokens], 1)]


def _embed(inputs: Inputs) -> Sequence[Tensor]:
    arguments = named(inputs, _EMBEDDING_ARGUMENTS)
    with torch.autocast(inputs["images"].device.type, inputs["product"], enabled=inputs["product"] != torch.float32):
        return [kernels.embed_visible(**arguments)]


EMBED_VISIBLE = Case(
    op="embed_visible",
    sizes=MODELS,
    inputs=_embedding_inputs,
    passes=(
        Pass(
            "embed_visible",
            # With more processors than large tiles, small tiles would be used.
            counted=Count((Point(1, 6), Point(2, 6), Point(5, 6), Point(6, 6))),
            run=lambda inputs: [launch_forward(**named(inputs, (*_EMBEDDING_ARGUMENTS, "product")))],
            reads=pick(*_EMBEDDING_ARGUMENTS),
            flops=_projection_flops,
        ),
        Pass(
            "embed_visible backward",
            # There is one part of the rows for 18 processors, at ViT-L for 24.
            counted=Count((Point(1, 24), Point(2, 24), Point(1, 48), Point(2, 48))),
            run=_embedding_gradients,
            reads=pick("d_tokens", "images", "visible", "mean", "std"),
            flops=_projection_flops,
        ),
    ),
    prepare=_prepare_convolution,
    eager=_convolution,
    public=_embed,
    bound=Bound(unique=1.1, hopper=True),
    trained=("weight", "bias", "cls"),
    upstream=("d_tokens",),
)
