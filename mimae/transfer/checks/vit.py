"""The whole ViT in plain torch, which is part of the check.py of formats that have only weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def vit(images: np.ndarray, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return tokens (B, 1 + L, D) and pooled features (B, D) of images uint8 (B, H, W, 3)."""
    functional, heads = torch.nn.functional, config["heads"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, (config["width"],), scale, shift, config["norm_eps"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(x: torch.Tensor, block: str) -> torch.Tensor:
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2) for part in linear(x, f"{block}.attn.qkv").chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(mixed, f"{block}.attn.proj")

    def mlp(x: torch.Tensor, block: str) -> torch.Tensor:
        return linear(functional.gelu(linear(x, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")

    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    patches = functional.conv2d(pixels, kernel, bias, stride=config["patch_size"])
    tokens = torch.cat([weights["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    tokens = tokens + weights["pos_embed"]
    for number in range(config["depth"]):
        block = f"blocks.{number}"
        tokens = tokens + attention(norm(tokens, f"{block}.norm1"), block)
        tokens = tokens + mlp(norm(tokens, f"{block}.norm2"), block)
    tokens = norm(tokens, "norm")
    return {"tokens": tokens.numpy(), "features": tokens[:, 1:].mean(1).numpy()}
