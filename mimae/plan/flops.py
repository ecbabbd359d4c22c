"""What a recipe costs in floating-point operations (method 7).

A multiply-add counts as two; norms, softmax, activations and the optimizer are not counted, nor is what
checkpointing recomputes. Letters: B images, N views, L patches, K visible, T = 1 + K, M targets, D width, Dd decoder
width, P patch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe


def encoder_flops(recipe: Recipe) -> int:
    """Forward FLOPs of the encoder for one view: its K visible patches and the class token."""
    model, K = recipe.model, visible(recipe)
    embed = 2 * K * patch_values(recipe) * model.width
    return embed + model.depth * _block(1 + K, model.width, model.mlp)


def decoder_flops(recipe: Recipe) -> int:
    """Forward FLOPs of the decoder for one view; its last block and its head answer for the targets alone, with
    cross attention every block does."""
    decoder, T, M = recipe.decoder, 1 + visible(recipe), targets(recipe)
    width, mlp = decoder.width, 4 * decoder.width
    embed = 2 * T * recipe.model.width * width
    head = 2 * M * width * patch_values(recipe)
    if decoder.attention == "cross":
        return embed + decoder.depth * _block(T, width, mlp, M) + head
    before = (decoder.depth - 1) * _block(T + M, width, mlp)
    return embed + before + _block(T + M, width, mlp, M) + head


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
        flops += 2 * objective.posterior_width * (3 * patches(recipe) + 2 * D)
    return flops


def image_flops(recipe: Recipe) -> int:
    """Forward FLOPs of one image with all of its views."""
    views = recipe.masking.num_masks * (encoder_flops(recipe) + decoder_flops(recipe))
    return views + objective_flops(recipe)


def step_flops(recipe: Recipe) -> int:
    """FLOPs of an optimizer step over all ranks; backward counts as two forwards."""
    return 3 * image_flops(recipe) * recipe.schedule.batch_size


def _block(tokens: int, width: int, mlp: int, answered: int | None = None) -> int:
    """A transformer block that answers for `answered` tokens, for all where it is not given: keys and values of
    `tokens`; of those answered for queries, projection and an MLP of width `mlp`; scores and weighted values."""
    wanted = tokens if answered is None else answered
    return 4 * tokens * width**2 + 4 * wanted * width * (width + mlp) + 4 * wanted * tokens * width


def targets(recipe: Recipe) -> int:
    """M, the patches that the decoder predicts from one view."""
    return visible(recipe) if recipe.decoder.predict == "next_view" else patches(recipe) - visible(recipe)


def patches(recipe: Recipe) -> int:
    """L, the patches of an image."""
    height, width = recipe.data.size_hw
    return (height // recipe.model.patch_size) * (width // recipe.model.patch_size)


def visible(recipe: Recipe) -> int:
    """K, the patches that a view shows."""
    return recipe.masking.num_visible(patches(recipe))


def patch_values(recipe: Recipe) -> int:
    """3P^2, the values of a patch."""
    return 3 * recipe.model.patch_size**2
