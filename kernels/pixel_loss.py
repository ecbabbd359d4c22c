"""The reconstruction loss and its gradient in one pass, with targets computed from uint8 pixels as they are needed.

A program owns a few patches of an image. It loads the pixels of each once, brings them to the target's scale in
registers, and compares them with the prediction of every view that has the patch as a target, in the row that the
inverted list (`places`) gives. Partial sums are added in the order of the programs, so that equal inputs give equal
bits.

If the loss has weight 1, its gradient is final when forward ends: backward reads the weight on the device and changes
d_predictions only if it is not 1.

Counted traffic at ViT-B (bf16): predictions and their gradient once, pixels once for an image, whatever the number of
views, and in addition the places of the patches: 1.005 of the floor, or 1.010 if the targets are the next view's
patches. Backward at weight 1 reads the weight once in each program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.places import check_ids, places
from mimae.kernels.runtime import Impl, chosen, jit, launch, tl

_PATCHES = 8
"""Number of patches of a program."""
_SCALING_PROGRAMS = 1024
_SCALING_BLOCK = 2048


def pixel_loss(
    predictions: Tensor,
    images: Tensor,
    targets: Tensor,
    mean: Tensor,
    std: Tensor,
    normalize: bool,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Return `scale` times the sum over images, views and targets of the mean squared error of a patch (method 2).

    With scale = 1 / (B N M) this is L_rec. predictions (B, N, M, 3P^2), images (B, H, W, 3) uint8, targets (B, N, M)
    int32 or int64 in [0, L), distinct within a view, mean and std (3,) -> scalar, fp32. float64 runs in plain PyTorch.
    `normalize`: the target patch is standardised to mean 0 and unbiased variance 1 (eps 1e-6).
    Raises ValueError for other shapes, dtypes and devices, for images that do not divide into patches, and for float64
    in triton. The fused gradient is scaled in place, so its graph serves one backward pass; the second raises
    RuntimeError.
    """
    _check(predictions, images, targets, mean, std)
    is_double = predictions.dtype == torch.float64
    if is_double and impl == "triton":
        raise ValueError("pixel_loss in triton is for fp32, fp16 and bf16, not for float64")
    if is_double or chosen("pixel_loss", predictions, impl) == "reference":
        return reference.pixel_loss(predictions, images, targets, mean, std, normalize, scale)
    with_gradient = predictions.requires_grad and torch.is_grad_enabled()
    return _pixel_loss(predictions, images, targets, mean, std, normalize, scale, with_gradient)[0]


def _check(predictions: Tensor, images: Tensor, targets: Tensor, mean: Tensor, std: Tensor) -> None:
    if predictions.dim() != 4 or not predictions.is_floating_point():
        raise ValueError(f"predictions are (B, N, M, 3P^2), floating point, not {_described(predictions)}")
    patch = _patch(predictions)
    if patch == 0 or 3 * patch * patch != predictions.shape[3]:
        raise ValueError(f"predictions of {predictions.shape[3]} pixel values do not fit a patch: legal is 3P^2")
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images are (B, H, W, 3), uint8, not {_described(images)}")
    B, height, width, _ = images.shape
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch}")
    check_ids("targets", targets, predictions, (height // patch) * (width // patch))
    if targets.shape[2] != predictions.shape[2] or predictions.shape[0] != B:
        raise ValueError(
            f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)} and {B} images do not fit"
        )
    for each in (mean, std):
        if each.shape != (3,) or not each.is_floating_point():
            raise ValueError(f"mean and std are (3,), floating point, not {_described(each)}")
    for each in (images, mean, std):
        if each.device != predictions.device:
            raise ValueError(f"predictions lie on {predictions.device}, another argument on {each.device}")


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}"


def _patch(predictions: Tensor) -> int:
    """P of predictions (..., 3P^2)."""
    return round((predictions.shape[-1] / 3) ** 0.5)


@torch.library.custom_op("mimae::pixel_loss", mutates_args=())
def _pixel_loss(
    predictions: Tensor,
    images: Tensor,
    targets: Tensor,
    mean: Tensor,
    std: Tensor,
    normalize: bool,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return launch_forward(predictions, images, targets, mean, std, normalize, scale, with_gradient)


@_pixel_loss.register_fake
def _(predictions: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, with_gradient = others
    return predictions.new_empty((), dtype=torch.float32), _empty_gradient(predictions, with_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    predictions, scale, d_predictions = inputs[0], inputs[6], output[1]
    _, ctx.factor = _factors(predictions, scale)
    ctx.is_spent = False
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(d_predictions)
    ctx.save_for_backward(d_predictions)


def _backward(ctx: Any, weight: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (d_predictions,) = ctx.saved_tensors
    if type(d_predictions) is not Tensor:
        # In a traced graph: it runs more than once, and a compiler fuses the product.
        scaled = (d_predictions.to(torch.float32) * (weight * ctx.factor)).to(d_predictions.dtype)
        return scaled, None, None, None, None, None, None, None
    if ctx.is_spent:
        raise RuntimeError(
            "a second backward pass through pixel_loss: the first has scaled its gradient in place; "
            "call pixel_loss again, or add the losses before one backward pass"
        )
    ctx.is_spent = True
    launch_backward(d_predictions, weight, ctx.factor)
    return d_predictions, None, None, None, None, None, None, None


_pixel_loss.register_autograd(_backward, setup_context=_setup_context)


def _factors(predictions: Tensor, scale: float) -> tuple[float, float]:
    """Return a and b in d_predictions = a b (predictions - target); forward applies a, and backward b.

    In fp16, backward applies both: the gradient of a mean would underflow before the gradient scaler's weight arrives.
    """
    factor = 2 * scale / predictions.shape[-1]
    return (1.0, factor) if predictions.dtype == torch.float16 else (factor, 1.0)


def _empty_gradient(predictions: Tensor, with_gradient: bool) -> Tensor:
    return torch.empty(predictions.shape if with_gradient else 0, dtype=predictions.dtype, device=predictions.device)


def launch_forward(
    predictions: Tensor,
    images: Tensor,
    targets: Tensor,
    mean: Tensor,
    std: Tensor,
    normalize: bool,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss of `pixel_loss` and d_predictions without backward's factor (see `_factors`), or an empty tensor.

    It takes two launches and a sum.
    """
    (B, N, M, size), patch = predictions.shape, _patch(predictions)
    height, width = images.shape[1:3]
    patches = (height // patch) * (width // patch)
    shares = -(-patches // _PATCHES)
    columns = 1 << (size - 1).bit_length()
    d_predictions = _empty_gradient(predictions, with_gradient)
    sums = torch.empty(B * shares, dtype=torch.float32, device=predictions.device)
    launch(
        _compare,
        (B * shares,),
        warps=min(8, max(1, columns // 256)),
        predictions=predictions.contiguous(),
        images=images.contiguous(),
        target_places=places(targets, patches),
        mean=mean.contiguous(),
        std=std.contiguous(),
        d_predictions=d_predictions,
        sums=sums,
        views=N,
        targets=M,
        patches=patches,
        shares=shares,
        across=width // patch,
        pitch=3 * width,
        factor=_factors(predictions, scale)[0],
        PATCH=patch,
        COLUMNS=columns,
        OWNED=_PATCHES,
        # Contiguous bytes of a patch, at most as many as the values of a prediction in a thread.
        RUN=min(3 * patch & -(3 * patch), 16 // predictions.element_size()),
        NORMALIZE=normalize,
        GRADIENT=with_gradient,
    )
    return sums.sum() * (scale / size), d_predictions


def launch_backward(values: Tensor, weight: Tensor, factor: float) -> None:
    """Multiply `values` in place by weight, a scalar on the device, and factor, in one launch.

    A factor of 1 is free.
    """
    launch(
        _scale,
        (min(_SCALING_PROGRAMS, -(-values.numel() // _SCALING_BLOCK)),),
        values=values,
        weight=weight,
        factor=factor,
        count=values.numel(),
        BLOCK=_SCALING_BLOCK,
    )


@jit
def _compare(  # type: ignore[no-untyped-def]
    predictions, images, target_places, mean, std, d_predictions, sums,
    views, targets, patches, shares, across, pitch, factor,
    PATCH: tl.constexpr, COLUMNS: tl.constexpr, OWNED: tl.constexpr, RUN: tl.constexpr,
    NORMALIZE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute the squared errors and the gradients of OWNED patches of an image in all views."""
    SIZE: tl.constexpr = 3 * PATCH * PATCH
    image = (tl.program_id(0) // shares).to(tl.int64)
    first = tl.program_id(0) % shares * OWNED
    last = tl.minimum(first + OWNED, patches)
    images += image * patches * SIZE
    target_places += image * views * patches
    value = tl.arange(0, COLUMNS)
    inside = value < SIZE
    # Line of the pixel of a value, and the byte in the line. The hints tell the compiler facts about the division.
    line = tl.max_constancy(value // (3 * PATCH), RUN)
    byte = tl.max_contiguous(value % (3 * PATCH), RUN)
    pixel = line * pitch + byte
    inverse_std = 1 / _of_channel(std, value % 3)
    shift = -_of_channel(mean, value % 3) * inverse_std
    slope = inverse_std / 255
    total = tl.zeros((COLUMNS,), tl.float32)
    pixels = tl.load(images + _corner(first, across, pitch, PATCH) + pixel, mask=inside, other=0)
    for patch in range(first, last):
        place = tl.load(target_places + patch)
        target = tl.where(inside, pixels.to(tl.float32) * slope + shift, 0)
        # These are the pixels of the next patch; they are loaded during the wait for this patch's predictions.
        follows = inside & (patch + 1 < last)
        pixels = tl.load(images + _corner(patch + 1, across, pitch, PATCH) + pixel, mask=follows, other=0)
        if NORMALIZE:
            centred = tl.where(inside, target - tl.sum(target, 0) / SIZE, 0)
            variance = tl.sum(centred * centred, 0) / (SIZE - 1)
            target = centred / tl.sqrt(variance + 1e-6)
        for view in range(views):
            next_place = tl.load(target_places + (view + 1) * patches + patch, mask=view + 1 < views, other=-1)
            if place >= 0:
                row = ((image * views + view) * targets + place) * SIZE + value
                error = tl.load(predictions + row, mask=inside, other=0).to(tl.float32) - target
                total += error * error
                if GRADIENT:
                    tl.store(d_predictions + row, error * factor, mask=inside)
            place = next_place
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@jit
def _corner(patch, across, pitch, PATCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the offset of a patch in its image."""
    return patch // across * (PATCH * pitch) + patch % across * (3 * PATCH)


@jit
def _of_channel(values, channel):  # type: ignore[no-untyped-def]
    """Return values (3,) for each channel, loaded as three scalars."""
    red, green, blue = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue)).to(tl.float32)


@jit
def _scale(values, weight, factor, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    factor *= tl.load(weight).to(tl.float32)
    if factor != 1:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(values + at, mask=at < count, other=0).to(tl.float32)
            tl.store(values + at, value * factor, mask=at < count)
