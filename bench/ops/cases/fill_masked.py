"""The decoder's rows, against MAE's gather of mask tokens.

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
    images_and_masks,
    named,
    pick,
    places,
)
from mimae.kernels.fill_masked import launch_backward, launch_forward


def _row_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    images, width = images_and_masks(size, batch, device), size.decoder_width
    rows = (batch, size.views, 1 + size.patches, width)
    return {
        "visible": images["visible"],
        "targets": images["targets"],
        "tokens": torch.randn(batch, size.views, 1 + size.visible, width, device=device).to(size.precision),
        "mask_token": torch.randn(width, device=device),
        "pos": torch.randn(1 + size.patches, width, device=device),
        "d_rows": torch.randn(rows, device=device),
    }


_ROW_ARGUMENTS = ("tokens", "visible", "targets", "mask_token", "pos")


def _prepare_restoring(size: Size, inputs: Inputs) -> Inputs:
    _, restore = places(inputs)
    as_is = named(inputs, ("mask_token", "pos"))
    d_class, d_others = by_view(inputs["d_rows"]).split([1, restore.shape[1]], 1)
    d_rows = torch.cat([d_class, d_others.gather(1, restore[:, :, None].expand_as(d_others))], 1)
    return {**as_is, "restore": restore, "tokens": by_view(inputs["tokens"]), "d_rows": d_rows}


def _restored(inputs: Inputs) -> Sequence[Tensor]:
    tokens, restore = inputs["tokens"], inputs["restore"]
    hidden = 1 + restore.shape[1] - tokens.shape[1]
    mask_tokens = inputs["mask_token"].to(tokens.dtype).repeat(tokens.shape[0], hidden, 1)
    shuffled = torch.cat([tokens[:, 1:], mask_tokens], 1)
    restored = torch.gather(shuffled, 1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
    return [torch.cat([tokens[:, :1], restored], 1) + inputs["pos"]]


def _fill(inputs: Inputs) -> Sequence[Tensor]:
    return [kernels.fill_masked(**named(inputs, _ROW_ARGUMENTS))]


FILL_MASKED = Case(
    op="fill_masked",
    sizes=(Size("decoder 512", 0, 1024),),
    inputs=_row_inputs,
    passes=(
        Pass(
            "fill_masked",
            # 32 views, of 8 images, share the positions.
            counted=Count((Point(1), Point(2), Point(3), Point(9))),
            run=lambda inputs: [launch_forward(**named(inputs, _ROW_ARGUMENTS))],
            reads=pick(*_ROW_ARGUMENTS),
        ),
        Pass(
            "fill_masked backward",
            counted=Count((Point(1), Point(2), Point(3), Point(13))),
            run=lambda inputs: launch_backward(
                inputs["d_rows"], inputs["tokens"].shape[2], inputs["tokens"].dtype, inputs["mask_token"].dtype
            ),
            reads=pick("d_rows"),
        ),
    ),
    prepare=_prepare_restoring,
    eager=_restored,
    public=_fill,
    bound=Bound(issued=1.1, eager=2),
    trained=("tokens", "mask_token"),
    upstream=("d_rows",),
)
