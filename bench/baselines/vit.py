"""timm's ViT with the sizes of a recipe."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mimae.config.recipe import TransferRecipe


def vit(recipe: TransferRecipe, **more: Any) -> Any:
    """Return timm's ViT with the image size, patch size, width, depth and heads of a recipe."""
    model = recipe.model
    sizes: Any = {"patch_size": model.patch_size, "embed_dim": model.width, "depth": model.depth}
    return VisionTransformer(img_size=recipe.data.size_hw, num_heads=model.heads, **sizes, **more)
