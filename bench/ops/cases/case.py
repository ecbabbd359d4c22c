"""The description of ops for the benches and their tests: one `Case` for each op.

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
"""Arguments of an op by name."""


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
    """Latent width, if it is not that of the size."""


def _images_and_programs(size: Size, batch: int, launches: Sequence[Launch]) -> list[float]:
    return [1, batch, sum(math.prod(launch.grid) for launch in launches)]


class Count(NamedTuple):
    """Method by which a pass is counted."""

    points: Sequence[Point]
    terms: Callable[[Size, int, Sequence[Launch]], list[float]] = _images_and_programs
    """The quantities of which the traffic is a linear function."""
    adaptive: Sequence[str] = ()
    """Names `kernel.PARAMETER` that follow the size of the grid, and may differ from those of production."""


class Bound(NamedTuple):
    """Upper or lower bounds for the figures of a case; a figure with None is only reported."""

    issued: float | None = None
    """Largest ratio of a pass's issued bytes to its floor."""
    unique: float | None = None
    """Largest ratio of a pass's unique bytes to its floor."""
    eager: float | None = None
    """Smallest ratio of the bytes of eager PyTorch to the issued bytes of all passes."""
    extra: float | None = None
    """Largest ratio of extra memory to that of inputs and results."""
    hopper: bool = False
    """True if its matrix products have to use Hopper's warp-group instructions."""


class Pass(NamedTuple):
    """A fused pass over an op's inputs."""

    name: str
    run: Callable[[Inputs], Sequence[Tensor]]
    """Function that launches the kernels. All tensors that it returns have to be written."""
    reads: Callable[[Inputs], Sequence[Tensor]]
    """Function that returns the tensors that have to be read."""
    counted: Count
    """Method by which its traffic is counted."""
    flops: Callable[[Size, int], float] = lambda size, batch: 0.0
    """FLOPs of the matrix products of a batch; a multiply-add counts as two."""


class Case(NamedTuple):
    """An op, or a pair of ops, with forward and backward as `passes`."""

    op: str
    sizes: Sequence[Size]
    inputs: Callable[[Size, int, torch.device], Inputs]
    """Function that makes the inputs of a batch from noise, reproducible after `torch.manual_seed`."""
    passes: Sequence[Pass]
    prepare: Callable[[Size, Inputs], Inputs]
    """Function that returns the inputs in the form that `eager` takes."""
    eager: Callable[[Inputs], Sequence[Tensor]]
    """The op in plain PyTorch, differentiable in the inputs of `trained`; `upstream` names the results' gradients."""
    public: Callable[[Inputs], Sequence[Tensor]]
    """The op as the model calls it, differentiable like `eager`."""
    bound: Bound
    trained: Sequence[str] = ()
    upstream: Sequence[str] = ()
    others: Callable[[torch.device], dict[str, Callable[[Inputs], Sequence[Tensor]]]] = lambda device: {}
    """Function that returns other forms for a device, by name. They take the same inputs as `eager`."""


def named(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """Return some of the inputs, as keyword arguments."""
    return {name: inputs[name] for name in names}


def pick(*names: str) -> Callable[[Inputs], list[Tensor]]:
    """Return a function that picks these tensors from the inputs."""
    return lambda inputs: [inputs[name] for name in names]


def numbers(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def recorded(fused: Pass, inputs: Inputs, target: Target) -> tuple[list[Launch], Sequence[Tensor]]:
    """Return the launches of a pass over meta tensors for a GPU like `target`, and its results."""
    launches: list[Launch] = []
    with watching(launches.append, target):
        results = fused.run(inputs)
    return launches, results


VIT_B = Size("ViT-B/16", 768, 1024)
VIT_L = Size("ViT-L/16", 1024, 1024)
MODELS = (VIT_B, VIT_L)
LARGE_BATCHES = tuple(size._replace(name=f"{size.name} B=4096", batch=4096) for size in MODELS)
"""Sizes for ops whose usual forms have a cost that is quadratic in the batch."""


# Inputs that several ops share


def images_and_masks(size: Size, batch: int, device: torch.device) -> Inputs:
    """Return pixels with the masks of all views, and the statistics of ImageNet."""
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
    """Reorder (B, N, ...) to (N B, ...): the order of a batch of images that is repeated once for each view."""
    return tensor.transpose(0, 1).flatten(0, 1)


def floats(inputs: Inputs) -> Tensor:
    """Return normalised images (B, 3, H, W)."""
    return ((inputs["images"] / 255 - inputs["mean"]) / inputs["std"]).permute(0, 3, 1, 2).contiguous()


def places(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return ids_keep (N B, K) and ids_restore (N B, L) of MAE."""
    keep = by_view(inputs["visible"]).long()
    return keep, torch.cat([keep, by_view(inputs["targets"]).long()], 1).argsort(1)
