"""Open this folder with torch alone, and compare its outputs with those stored at its export.

python check.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent


def attention(x: Tensor, weights: dict[str, Tensor], block: str, heads: int) -> Tensor:
    """Self-attention of tokens (B, T, D)."""
    qkv = F.linear(x, weights[f"{block}.attn.qkv.weight"], weights[f"{block}.attn.qkv.bias"])
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed, weights[f"{block}.attn.proj.weight"], weights[f"{block}.attn.proj.bias"])


def mlp(x: Tensor, weights: dict[str, Tensor], block: str) -> Tensor:
    """Two layers with GELU between them."""
    x = F.gelu(F.linear(x, weights[f"{block}.mlp.fc1.weight"], weights[f"{block}.mlp.fc1.bias"]))
    return F.linear(x, weights[f"{block}.mlp.fc2.weight"], weights[f"{block}.mlp.fc2.bias"])


def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return tokens (B, 1 + L, D) and pooled features (B, D) of images uint8 (B, H, W, 3): the whole ViT."""
    config = json.loads((HERE / "config.json").read_text())["mimae"]
    weights = {
        name: tensor.float() for name, tensor in torch.load(HERE / "model.pth", weights_only=True)["model"].items()
    }
    width, eps = config["width"], config["norm_eps"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    patches = F.conv2d(
        pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=config["patch_size"]
    )
    tokens = torch.cat([weights["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    tokens = tokens + weights["pos_embed"]
    for number in range(config["depth"]):
        block = f"blocks.{number}"
        tokens = tokens + attention(norm(tokens, f"{block}.norm1"), weights, block, config["heads"])
        tokens = tokens + mlp(norm(tokens, f"{block}.norm2"), weights, block)
    tokens = norm(tokens, "norm")
    return {"tokens": tokens.numpy(), "features": tokens[:, 1:].mean(1).numpy()}
