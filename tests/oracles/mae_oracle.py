"""A masked autoencoder (He et al. 2021) on one view per image, from the formulas, in plain tensor algebra.

It shares no module, op or helper with the package. Wherever possible it computes the same numbers in another way:
images are converted to float first, a convolution projects every patch before the visible ones are gathered, attention
is an explicit softmax, and the decoder restores the image order of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return MAE's fixed positions (1 + rows * columns, width): single-precision constants, as float64.

    The class token's row is zero. The first half of a patch's vector encodes its column, the second half its row. Each
    half has first all sines, then all cosines, of coordinate / 10000^(i / (width / 4)).
    """
    quarter = width // 4
    table = torch.zeros(1 + grid[0] * grid[1], width, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                table[1 + row * grid[1] + column, i::quarter] = torch.tensor(
                    [
                        math.sin(column * frequency),
                        math.cos(column * frequency),
                        math.sin(row * frequency),
                        math.cos(row * frequency),
                    ],
                    dtype=torch.float64,
                )
    return table.float().double()


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x: Tensor, context: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    """Return attention, in which every token of x attends to every token of context."""
    batch, tokens, width = x.shape
    query, key, value = (
        linear(of, weights, f"{name}.qkv").view(batch, -1, 3, heads, width // heads)[:, :, i].transpose(1, 2)
        for i, of in enumerate((x, context, context))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(width // heads)
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed = scores / scores.sum(-1, keepdim=True) @ value
    return linear(mixed.transpose(1, 2).reshape(batch, tokens, width), weights, f"{name}.proj")


def block(x: Tensor, context: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    normed, normed_context = (layer_norm(of, weights, f"{name}.norm1") for of in (x, context))
    x = x + attention(normed, normed_context, weights, f"{name}.attn", heads)
    inner = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    inner = inner * (1 + torch.erf(inner / math.sqrt(2.0))) / 2
    return x + linear(inner, weights, f"{name}.mlp.fc2")


def depth_of(weights: Weights, prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in weights if name.startswith(prefix))


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert uint8 (B, H, W, 3) to float64 (B, 3, H, W), normalised by channel."""
    channels = images.to(torch.float64).permute(0, 3, 1, 2) / 255
    return (channels - torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)) / torch.tensor(
        std, dtype=torch.float64
    ).view(1, 3, 1, 1)


def pixel_targets(pixels: Tensor, patch: int, normalize: bool) -> Tensor:
    """Convert (B, 3, H, W) to patches (B, L, 3 P^2), with values in the order (row, column, channel)."""
    batch, _, height, width = pixels.shape
    targets = torch.stack(
        [
            pixels[:, :, top : top + patch, left : left + patch].permute(0, 2, 3, 1).reshape(batch, -1)
            for top in range(0, height, patch)
            for left in range(0, width, patch)
        ],
        1,
    )
    if not normalize:
        return targets
    centred = targets - targets.mean(-1, keepdim=True)
    variance = (centred**2).sum(-1, keepdim=True) / (targets.shape[-1] - 1)
    return centred / torch.sqrt(variance + 1e-6)


def mae_loss(
    weights: Weights,
    images: Tensor,
    visible: Tensor,
    *,
    patch: int,
    heads: int,
    decoder_heads: int,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: bool,
    targets: Tensor | None = None,
    cross: bool = False,
) -> Tensor:
    """Return L_rec of images uint8 (B, H, W, 3).

    The patches `visible` (B, K) are shown, and the patches `targets` (B, M), or all others, are predicted. With `cross`
    the target tokens attend only to the visible ones. `weights` are float64: the encoder's have timm's names with the
    prefix `encoder.`, the decoder's have the prefix `decoder.`.
    """
    batch, num_visible = visible.shape
    visible = visible.long()
    grid = (images.shape[1] // patch, images.shape[2] // patch)
    num_patches = grid[0] * grid[1]
    pixels = normalised(images, mean, std)
    rows = torch.arange(batch)[:, None]

    embedded = F.conv2d(
        pixels,
        weights["encoder.patch_embed.proj.weight"],
        weights["encoder.patch_embed.proj.bias"],
        stride=patch,
    )
    tokens = embedded.flatten(2).transpose(1, 2)
    positions = sincos_positions(grid, tokens.shape[-1])
    tokens = (tokens + positions[1:])[rows, visible]
    tokens = torch.cat([(weights["encoder.cls_token"] + positions[0]).expand(batch, 1, -1), tokens], 1)
    for i in range(depth_of(weights, "encoder.blocks.")):
        tokens = block(tokens, tokens, weights, f"encoder.blocks.{i}", heads)
    tokens = layer_norm(tokens, weights, "encoder.norm")

    shown = torch.zeros(batch, num_patches, dtype=torch.bool).scatter(1, visible, True)
    if targets is None:
        targets = torch.stack([(~row).nonzero()[:, 0] for row in shown])
    tokens = linear(tokens, weights, "decoder.embed")
    shuffled = torch.cat([tokens[:, 1:], weights["decoder.mask_token"].expand(batch, targets.shape[1], -1)], 1)
    places, in_image_order = torch.cat([visible, targets.long()], 1).sort(1)
    positions = sincos_positions(grid, tokens.shape[-1])
    tokens = torch.cat([tokens[:, :1] + positions[0], shuffled[rows, in_image_order] + positions[1:][places]], 1)
    is_target = torch.cat([torch.zeros(batch, 1, dtype=torch.bool), ~shown.gather(1, places)], 1)
    context = tokens[~is_target].view(batch, 1 + num_visible, -1)
    for i in range(depth_of(weights, "decoder.blocks.")):
        tokens = block(tokens, context if cross else tokens, weights, f"decoder.blocks.{i}", decoder_heads)
    predictions = linear(layer_norm(tokens, weights, "decoder.norm"), weights, "decoder.head")[:, 1:]

    errors = ((predictions - pixel_targets(pixels, patch, normalize)[rows, places]) ** 2).mean(-1)
    return errors[is_target[:, 1:]].mean()
