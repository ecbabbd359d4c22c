"""What a recipe costs in floating-point operations, and what a GPU could do at best (method 7).

A multiply-add counts as two; norms, softmax, activations and the optimizer are not counted, nor is what
checkpointing recomputes. Letters: B images, N views, L patches, K visible, T = 1 + K, M targets, D width, Dd decoder
width, P patch size.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from mimae.config import Recipe


class Peak(NamedTuple):
    """Dense matrix products of one device, in TFLOP/s; None where it has no units for the format."""

    bf16: float | None
    tf32: float | None
    fp32: float


# From the vendor's data sheets and architecture papers: dense (no sparsity), accumulating in fp32, at boost
# clock. The first pattern that is found in the name of a device counts.
PEAKS = {
    r"\bGB200\b": Peak(2500, 1250, 80),
    r"\bB200\b": Peak(2250, 1100, 75),
    r"\bH[12]00 NVL\b": Peak(835, 417, 60),
    r"\bH100 PCIe\b": Peak(756, 378, 51),
    r"\b(H100|H200|GH200)\b": Peak(989, 494, 67),
    r"\bA100\b": Peak(312, 156, 19.5),
    r"\bA40\b": Peak(149.7, 74.8, 37.4),
    r"\bA10\b": Peak(125, 62.5, 31.2),
    r"\bL40S\b": Peak(362, 183, 91.6),
    r"\bL40\b": Peak(181, 90.5, 90.5),
    r"\bL4\b": Peak(121, 60, 30.3),
    r"\bRTX A6000\b": Peak(154.8, 77.4, 38.7),
    r"\bRTX 5090$": Peak(209.5, 104.8, 104.8),
    r"\bRTX 4090$": Peak(165.2, 82.6, 82.6),
    r"\bRTX 3090$": Peak(71, 35.6, 35.6),
    r"\bV100S?-PCIE\b": Peak(None, None, 14),
    r"\bV100\b": Peak(None, None, 15.7),
}


def device_name(device: torch.device) -> str:
    """The name of a device as people and PEAKS know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device for the matrix products of `precision` (fp32 or bf16); None where not known.

    fp32 products that torch is told to run in TF32 (`torch.set_float32_matmul_precision`) have TF32's peak.
    """
    # A slice of a GPU, and the laptop part of the same name, are other devices.
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    peak = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device_name)), None)
    if peak is None:
        return None
    if precision == "bf16":
        tera = peak.bf16
    else:
        exact = torch.get_float32_matmul_precision() == "highest" or peak.tf32 is None
        tera = peak.fp32 if exact else peak.tf32
    return None if tera is None else tera * 1e12


def encoder_flops(recipe: Recipe) -> int:
    """Forward FLOPs of the encoder for one view: its K visible patches and the class token."""
    model, K = recipe.model, _visible(recipe)
    embed = 2 * K * _patch_values(recipe) * model.width
    return embed + model.depth * _block(1 + K, model.width)


def decoder_flops(recipe: Recipe) -> int:
    """Forward FLOPs of the decoder for one view; its last block and its head answer for the targets alone, with
    cross attention every block does."""
    decoder, T, M = recipe.decoder, 1 + _visible(recipe), targets(recipe)
    embed = 2 * T * recipe.model.width * decoder.width
    head = 2 * M * decoder.width * _patch_values(recipe)
    if decoder.attention == "cross":
        return embed + decoder.depth * _block(T, decoder.width, M) + head
    before = (decoder.depth - 1) * _block(T + M, decoder.width)
    return embed + before + _block(T + M, decoder.width, M) + head


def objective_flops(recipe: Recipe) -> int:
    """Forward FLOPs of the MI terms for one image: InfoNCE's products over the micro-batch of all ranks, the
    projector and V. Next to nothing at size: there the memory of these terms counts."""
    objective, N, D = recipe.objective, recipe.masking.num_masks, recipe.model.width
    flops = 0
    if objective.max_mi > 0:
        B = recipe.schedule.batch_size // recipe.schedule.accumulate
        flops += N * (N - 1) // 2 * 2 * B * D
        flops += N * 2 * 2 * D * 2 * D if objective.projector == "mlp" else 0
    if objective.min_mi > 0:
        flops += 2 * objective.posterior_width * (3 * _patches(recipe) + 2 * D)
    return flops


def image_flops(recipe: Recipe) -> int:
    """Forward FLOPs of one image with all of its views."""
    views = recipe.masking.num_masks * (encoder_flops(recipe) + decoder_flops(recipe))
    return views + objective_flops(recipe)


def step_flops(recipe: Recipe) -> int:
    """FLOPs of an optimizer step over all ranks; backward counts as two forwards."""
    return 3 * image_flops(recipe) * recipe.schedule.batch_size


def _block(tokens: int, width: int, answered: int | None = None) -> int:
    """A transformer block that answers for `answered` tokens, for all where it is not given: keys and values of
    `tokens`; of those answered for queries, projection and an MLP of 4 x width; scores and weighted values."""
    wanted = tokens if answered is None else answered
    return 4 * tokens * width**2 + 20 * wanted * width**2 + 4 * wanted * tokens * width


def targets(recipe: Recipe) -> int:
    """M, the patches that the decoder predicts from one view."""
    return _visible(recipe) if recipe.decoder.predict == "next_view" else _patches(recipe) - _visible(recipe)


def _patches(recipe: Recipe) -> int:
    height, width = recipe.data.size_hw
    return (height // recipe.model.patch_size) * (width // recipe.model.patch_size)


def _visible(recipe: Recipe) -> int:
    return recipe.masking.num_visible(_patches(recipe))


def _patch_values(recipe: Recipe) -> int:
    return 3 * recipe.model.patch_size**2
