"""The masks of a batch, against two argsorts.

The letters in shapes are those of `case`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimae import kernels
from mimae.bench.ops.cases.case import Bound, Case, Count, Inputs, Pass, Point, Size, pick
from mimae.kernels.orthogonal_masks import launch_forward


def _mask_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    return {
        "sample_ids": torch.arange(batch, device=device),
        "num_patches": size.patches,
        "num_views": size.views,
        "num_visible": size.visible,
    }


def _two_argsorts(inputs: Inputs) -> Sequence[Tensor]:
    ids, views, shown = inputs["sample_ids"], inputs["num_views"], inputs["num_visible"]
    permutation = torch.rand(ids.shape[0], inputs["num_patches"], device=ids.device).argsort(1)
    shuffle = torch.cat([permutation.roll(-view * shown, 1) for view in range(views)])
    return shuffle[:, :shown], shuffle.argsort(1)


def _draw(inputs: Inputs) -> Sequence[Tensor]:
    return kernels.orthogonal_masks(0, 0, **inputs)


ORTHOGONAL_MASKS = Case(
    op="orthogonal_masks",
    sizes=(Size("L=196", 0, 1024),),
    inputs=_mask_inputs,
    passes=(
        Pass(
            "orthogonal_masks",
            counted=Count((Point(1), Point(2), Point(3))),
            run=lambda inputs: launch_forward(seed=0, epoch=0, **inputs),
            reads=pick("sample_ids"),
        ),
    ),
    prepare=lambda size, inputs: inputs,
    eager=_two_argsorts,
    public=_draw,
    bound=Bound(issued=1.1),
)
