"""Latents, directions and moments of views, against means in PyTorch.

The letters in shapes are those of `case`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimae import kernels
from mimae.bench.ops.cases.case import MODELS, Bound, Case, Count, Inputs, Pass, Point, Size, by_view, named, pick
from mimae.kernels.view_latents import launch_backward, launch_forward


def _token_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    # The encoder's final norm returns fp32.
    z = torch.randn(batch, size.views, size.width, device=device)
    tokens = torch.randn(batch, size.views, 1 + size.visible, size.width, device=device)
    return {"tokens": tokens, "z": z, "d_z": torch.randn_like(z), "d_u": torch.randn_like(z)}


def _pooled(inputs: Inputs) -> Sequence[Tensor]:
    z = inputs["tokens"][:, 1:].mean(1)
    return z, F.normalize(z, dim=-1), *torch.var_mean(z.detach(), 0, correction=0)


VIEW_LATENTS = Case(
    op="view_latents",
    sizes=MODELS,
    inputs=_token_inputs,
    passes=(
        Pass(
            "view_latents",
            counted=Count((Point(4, 1), Point(4, 2), Point(6, 1), Point(8, 2)), adaptive=("_merge.ROWS",)),
            run=lambda inputs: launch_forward(inputs["tokens"], None, 1),
            reads=lambda inputs: [inputs["tokens"][:, :, 1:]],
        ),
        Pass(
            "view_latents backward",
            counted=Count((Point(1), Point(2), Point(3))),
            run=lambda inputs: [
                launch_backward(
                    **named(inputs, ("z", "d_z", "d_u")),
                    visible=None,
                    first=1,
                    length=inputs["tokens"].shape[2],
                    dtype=inputs["tokens"].dtype,
                )
            ],
            reads=pick("z", "d_z", "d_u"),
        ),
    ),
    prepare=lambda size, inputs: {name: by_view(value) for name, value in inputs.items()},
    eager=_pooled,
    public=lambda inputs: kernels.view_latents(inputs["tokens"], first=1)[:2],
    bound=Bound(issued=1.1),
    trained=("tokens",),
    upstream=("d_z", "d_u"),
)
