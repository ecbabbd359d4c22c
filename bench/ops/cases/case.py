"""The description of an op for the benches and their tests: one `Case` for each op, with all that is asked of it.

Letters in shapes: B images, N views, L patches, K visible, M targets, D width, Dd decoder width, P patch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Launch, Target, watching

Inputs = dict[str, Any]
"""Arguments by name."""


class Size(NamedTuple):
    """A production size: a ViT at an image size, masks, and a batch."""

    name: str
    width: int
    batch: int
    precision: torch.dtype = torch.bfloat16
    """Data type of the matrix products. Tensors that autocast keeps in fp32 (norms, positions, latents) are fp32."""
    decoder_width: int = 512
    side: int = 224
    patch: int = 16
    views: int = 4
    loss_weight: float = 1.0
    """Factor of the loss in backward: one over the steps of gradient accumulation."""

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def visible(self) -> int:
        return self.patches // self.views


class Point(NamedTuple):
    """Conditions under which a case is counted."""

    batch: int
    processors: int = 1
    """Number of multiprocessors of the GPU that launchers see; it is small, so that grids that fill it are small."""
    width: int | None = None
    """Latent width, where not that of the size."""


def _images_and_programs(size: Size, batch: int, launches: Sequence[Launch]) -> list[float]:
    return [1, batch, sum(math.prod(launch.grid) for launch in launches)]


class Count(NamedTuple):
    """Method by which a pass is counted."""

    points: Sequence[Point]
    terms: Callable[[Size, int, Sequence[Launch]], list[float]] = _images_and_programs
    """The quantities of which the traffic is a linear function."""
    adaptive: Sequence[str] = ()
    """`kernel.PARAMETER`s that follow the size of the grid, and need not be those of production."""


class Bound(NamedTuple):
    """Bound that a case has to keep; None: the figure is only reported."""

    issued: float | None = None
    """Issued bytes of a pass, over its floor."""
    unique: float | None = None
    """Different bytes of a pass, over its floor."""
    eager: float | None = None
    """Bytes of eager PyTorch over issued ones, all passes."""
    extra: float | None = None
    """Memory beside inputs and results, over their sum."""
    hopper: bool = False
    """Its matrix products run on Hopper's warp-group instructions."""


class Pass(NamedTuple):
    """A fused pass over an op's inputs."""

    name: str
    run: Callable[[Inputs], Sequence[Tensor]]
    """Launches the kernels; all that it returns has to be written."""
    reads: Callable[[Inputs], Sequence[Tensor]]
    """Return the tensors that have to be read."""
    counted: Count
    """Method by which its traffic is counted."""
    flops: Callable[[Size, int], float] = lambda size, batch: 0.0
    """FLOPs of the matrix products of a batch; a multiply-add counts as two."""


class Case(NamedTuple):
    """An op, or two that belong together, as `passes` forward and backward."""

    op: str
    sizes: Sequence[Size]
    inputs: Callable[[Size, int, torch.device], Inputs]
    """Make the inputs of a batch from noise, reproducible after `torch.manual_seed`."""
    passes: Sequence[Pass]
    prepare: Callable[[Size, Inputs], Inputs]
    """Return the same inputs in the form that `eager` takes."""
    eager: Callable[[Inputs], Sequence[Tensor]]
    """Differentiable in what `trained` names, through the results that have a gradient in `upstream`."""
    public: Callable[[Inputs], Sequence[Tensor]]
    """The op as the model calls it, differentiable as `eager` is."""
    bound: Bound
    trained: Sequence[str] = ()
    upstream: Sequence[str] = ()
    others: Callable[[torch.device], dict[str, Callable[[Inputs], Sequence[Tensor]]]] = lambda device: {}
    """Further forms, by name, that take their inputs as `eager` does and run on a device."""


def named(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """Return some of the inputs, as keyword arguments."""
    return {name: inputs[name] for name in names}


def pick(*names: str) -> Callable[[Inputs], list[Tensor]]:
    """Return a function that picks these tensors from the inputs."""
    return lambda inputs: [inputs[name] for name in names]


def numbers(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def recorded(fused: Pass, inputs: Inputs, target: Target) -> tuple[list[Launch], Sequence[Tensor]]:
    """The launches of a pass over meta tensors, for a GPU like `target`, and its results."""
    launches: list[Launch] = []
    with watching(launches.append, target):
        results = fused.run(inputs)
    return launches, results


VIT_B = Size("ViT-B/16", 768, 1024)
VIT_L = Size("ViT-L/16", 1024, 1024)
MODELS = (VIT_B, VIT_L)
LARGE_BATCHES = tuple(size._replace(name=f"{size.name} B=4096", batch=4096) for size in MODELS)
"""Sizes for ops whose usual forms do work that grows with the square of the batch."""


# Inputs that several ops share


def images_and_masks(size: Size, batch: int, device: torch.device) -> Inputs:
    """Pixels with the masks of all views, and the statistics of ImageNet."""
    visible, hidden = reference.orthogonal_masks(
        0, 0, torch.arange(batch, device=device), size.patches, size.views, size.visible
    )
    return {
        "images": torch.randint(256, (batch, size.side, size.side, 3), dtype=torch.uint8, device=device),
        "visible": visible,
        "targets": hidden,
        "mean": torch.tensor((0.485, 0.456, 0.406)).to(device),
        "std": torch.tensor((0.229, 0.224, 0.225)).to(device),
    }


def by_view(tensor: Tensor) -> Tensor:
    """(B, N, ...) -> (N B, ...), as images repeated once per view lie."""
    return tensor.transpose(0, 1).flatten(0, 1)


def floats(inputs: Inputs) -> Tensor:
    """Normalised images (B, 3, H, W)."""
    return ((inputs["images"] / 255 - inputs["mean"]) / inputs["std"]).permute(0, 3, 1, 2).contiguous()


def places(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """ids_keep (N B, K) and ids_restore (N B, L) of MAE."""
    keep = by_view(inputs["visible"]).long()
    return keep, torch.cat([keep, by_view(inputs["targets"]).long()], 1).argsort(1)
