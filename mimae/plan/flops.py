"""Floating-point operations of a recipe: the products of a forward, counted by torch on fake tensors.

A multiply-add counts as two. Norms, softmax, activations, the optimizer and recomputation by checkpointing are not
counted. The counted model is the one that runs, so a new term or layer needs no formula here. The closed formula of
method 7 gives the same numbers, see tests/plan/formula.py. A count takes 0.1 to 1 s and is cached.

`size_hw`: height and width of the images in pixels; None: those of data.image_size.

Letters: B images, N views, K visible, M targets, D width, P patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimae import distributed, kernels
from mimae.data.settings import DataSettings
from mimae.model.decoder import Decoder
from mimae.model.encoder import Encoder
from mimae.model.geometry import Geometry, Grid, geometry
from mimae.model.settings import DecoderSettings, ModelSettings
from mimae.objective.objective import Objective
from mimae.objective.settings import ObjectiveSettings
from mimae.optim import resolution
from mimae.optim.resolution import Size

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe


def encoder_flops(recipe: Recipe, size_hw: Size | None = None) -> int:
    """Return the forward FLOPs of the encoder for one view: its K visible patches and the class token."""
    sizes = geometry(recipe, size_hw)
    data = recipe.data.model_copy(update={"image_size": sizes.grid.size_hw})
    return _encoder(data, counted(recipe.model), sizes.visible)


def decoder_flops(recipe: Recipe, size_hw: Size | None = None) -> int:
    """Return the forward FLOPs of the decoder for one view."""
    return _decoder(recipe.decoder, counted(recipe.model), geometry(recipe, size_hw))


def objective_flops(recipe: Recipe, size_hw: Size | None = None) -> int:
    """Return the forward FLOPs of the objective for one image.

    They are InfoNCE's products over the micro-batch of all ranks, and the networks of the terms. At production sizes
    they are negligible; there the memory of these terms matters.
    """
    images = recipe.schedule.batch_size // recipe.schedule.accumulate
    sizes, whole = geometry(recipe, size_hw), geometry(recipe).grid
    return _objective(recipe.objective, recipe.model.width, sizes, whole, images) // images


def image_flops(recipe: Recipe, size_hw: Size | None = None) -> int:
    """Return the forward FLOPs of one image with all of its views."""
    views = recipe.masking.num_masks * (encoder_flops(recipe, size_hw) + decoder_flops(recipe, size_hw))
    return views + objective_flops(recipe, size_hw)


def step_flops(recipe: Recipe, size_hw: Size | None = None) -> int:
    """Return the FLOPs of an optimizer step over all ranks; backward counts as two forwards."""
    return 3 * image_flops(recipe, size_hw) * recipe.schedule.batch_size


def run_flops(recipe: Recipe) -> float:
    """Return the FLOPs of an optimizer step over all ranks, as a mean over the stages of schedule.resolution."""
    shares = resolution.shares(recipe.schedule, recipe.data.size_hw)
    return sum(share * step_flops(recipe, size_hw) for size_hw, share in shares)


M = TypeVar("M", bound=nn.Module)


def trained_flops(outline: Callable[[], M], loss: Callable[[M], Tensor | None]) -> int | None:
    """Return the FLOPs of the forward and the backward that `loss` makes of a model: those of parameters that are not
    trained are left out; None where it makes none. `outline` makes the model on the meta device; `loss` runs on fake
    tensors."""
    with _counting() as counter:
        model = outline()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty_like(parameter, device="cpu")
                module.register_parameter(name, nn.Parameter(fake, parameter.requires_grad))
        with counter:
            total = loss(model)
            if total is None:
                return None
            total.backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops()


def counted(model: ModelSettings) -> ModelSettings:
    """Return the settings without those that do not change a product."""
    return model.model_copy(update={"attention": "sdpa", "checkpointing": "none", "residual": "fp32"})


@cache
def _encoder(data: DataSettings, model: ModelSettings, visible: int) -> int:
    with _counting() as counter:
        encoder = Encoder(model, data.size_hw, data.mean, data.std).requires_grad_(False)
        images = torch.empty(1, *data.size_hw, 3, dtype=torch.uint8)
        with counter:
            encoder(images, torch.empty(1, 1, visible, dtype=torch.int32))
    return counter.get_total_flops()


@cache
def _decoder(settings: DecoderSettings, model: ModelSettings, sizes: Geometry) -> int:
    with _counting() as counter:
        decoder = Decoder(settings, model, sizes.grid).requires_grad_(False)
        tokens = torch.empty(1, 1, 1 + sizes.visible, model.width)
        ids = [torch.empty(1, 1, count, dtype=torch.int32) for count in (sizes.visible, sizes.targets)]
        with counter:
            decoder(tokens, *ids)
    return counter.get_total_flops()


@cache
def _objective(settings: ObjectiveSettings, width: int, sizes: Geometry, whole: Grid, images: int) -> int:
    with _counting() as counter:
        objective = Objective(settings, sizes.views, width, whole).requires_grad_(False)
        tokens = torch.empty(images, sizes.views, 1 + sizes.visible, width)
        predictions = torch.empty(images, sizes.views, sizes.targets, sizes.grid.values)
        pixels = torch.empty(images, *sizes.grid.size_hw, 3, dtype=torch.uint8)
        ids = torch.empty(images, sizes.views, sizes.targets, dtype=torch.int32)
        mean, std = torch.empty(2, 3)
        with counter:
            objective(predictions, objective.start(tokens), pixels, ids, mean, std)
    return counter.get_total_flops()


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count in fake mode: tensors have no memory, this process is the only rank, and ops run as on a GPU.

    Attention runs as two products, because torch has no formula for the CPU's fused form.
    """
    formulas: dict[Any, Any] = {getattr(torch.ops.mimae, op): formula for op, formula in kernels.FLOPS.items()}
    with (
        distributed.alone(),
        FakeTensorMode(),
        kernels.prefer("triton"),
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast("cpu", enabled=False),
    ):
        yield FlopCounterMode(display=False, custom_mapping=formulas)
