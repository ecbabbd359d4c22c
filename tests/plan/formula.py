"""The closed formula of the cost model (method 7), as an independent check of what torch counts.

Forward FLOPs, 2 per multiply-add. Letters: B images, N views, L patches, K visible, T = 1 + K, M targets, D width, Dd
decoder width, P patch size.
"""

from __future__ import annotations

from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry


def encoder_flops(recipe: Recipe) -> int:
    """Return the FLOPs of the encoder for one view: its K visible patches and the class token."""
    model, sizes = recipe.model, geometry(recipe)
    embed = 2 * sizes.visible * sizes.grid.values * model.width
    return embed + model.depth * _block(1 + sizes.visible, model.width, model.mlp)


def decoder_flops(recipe: Recipe) -> int:
    """Return the FLOPs of the decoder for one view.

    Its last block and its head compute only the targets; with cross attention every block does.
    """
    decoder, sizes = recipe.decoder, geometry(recipe)
    T, M, width, mlp = 1 + sizes.visible, sizes.targets, decoder.width, 4 * decoder.width
    embed = 2 * T * recipe.model.width * width
    head = 2 * M * width * sizes.grid.values
    if decoder.attention == "cross":
        return embed + decoder.depth * _block(T, width, mlp, M) + head
    before = (decoder.depth - 1) * _block(T + M, width, mlp)
    return embed + before + _block(T + M, width, mlp, M) + head


def objective_flops(recipe: Recipe) -> int:
    """Return the FLOPs of the MI terms for one image.

    They are InfoNCE's products over the micro-batch of all ranks, the projector and V.
    """
    objective, N, D = recipe.objective, recipe.masking.num_masks, recipe.model.width
    flops = 0
    if objective.max_mi > 0:
        B = recipe.schedule.batch_size // recipe.schedule.accumulate
        flops += N * (N - 1) // 2 * 2 * B * D
        flops += N * 2 * 2 * D * 2 * D if objective.projector == "mlp" else 0
    if objective.min_mi > 0:
        flops += 2 * objective.posterior_width * (3 * geometry(recipe).grid.patches + 2 * D)
    return flops


def step_flops(recipe: Recipe) -> int:
    """Return the FLOPs of an optimizer step; backward counts as two forwards."""
    views = recipe.masking.num_masks * (encoder_flops(recipe) + decoder_flops(recipe))
    return 3 * (views + objective_flops(recipe)) * recipe.schedule.batch_size


def _block(tokens: int, width: int, mlp: int, answered: int | None = None) -> int:
    """Return the FLOPs of a transformer block that computes `answered` of its `tokens` tokens, or all.

    They are keys and values of all tokens, queries, projection and an MLP of width `mlp` of the computed tokens, scores
    and weighted values.
    """
    wanted = tokens if answered is None else answered
    return 4 * tokens * width**2 + 4 * wanted * width * (width + mlp) + 4 * wanted * tokens * width
