"""The roof of a step's speed: the measured rate of matrix products on this machine, and those that a step runs."""

from __future__ import annotations

import torch

from mimae.bench.machine import Product, matmul_rate
from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SQUARE_SIDE = {"cpu": 2048, "cuda": 8192}
"""Sides of the square matrices for the matrix rate of a device."""

PRODUCT_SECONDS = {"cpu": 0.1, "cuda": 0.02}
"""Approximate seconds for which a device repeats a matrix product to find its best time; at least twice."""


def roof(recipe: Recipe, device: torch.device) -> dict[str, dict[str, float]]:
    """Return measured matrix rates in FLOP/s by precision: of large square matrices and of the model's layers."""
    side, seconds = SQUARE_SIDE[device.type], PRODUCT_SECONDS[device.type]
    return {
        precision: {
            "square": matmul_rate([Product(side, side, side)], dtype, device, seconds),
            "layers": matmul_rate(products(recipe), dtype, device, seconds),
        }
        for precision, dtype in DTYPES.items()
    }


def products(recipe: Recipe) -> list[Product]:
    """Return the linear layers of the encoder and the decoder in one step."""
    model, decoder, sizes = recipe.model, recipe.decoder, geometry(recipe)
    views, values = recipe.schedule.batch_size * sizes.views, sizes.grid.values

    def blocks(tokens: int, width: int, layers: int) -> list[Product]:
        inner_and_columns = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        return [Product(views * tokens, inner, columns, layers) for inner, columns in inner_and_columns]

    def asking(tokens: int, context: int, width: int, layers: int) -> list[Product]:
        keys_and_values = Product(views * context, width, 2 * width, layers)
        shapes = [(width, width), (width, width), (width, 4 * width), (4 * width, width)]
        return [keys_and_values, *(Product(views * tokens, inner, columns, layers) for inner, columns in shapes)]

    shown, wanted = 1 + sizes.visible, sizes.targets
    decode = (
        asking(wanted, shown, decoder.width, decoder.depth)
        if decoder.attention == "cross"
        else [
            *blocks(shown + wanted, decoder.width, decoder.depth - 1),
            *asking(wanted, shown + wanted, decoder.width, 1),
        ]
    )
    return [
        Product(views * sizes.visible, values, model.width),
        *blocks(shown, model.width, model.depth),
        Product(views * shown, model.width, decoder.width),
        *decode,
        Product(views * wanted, decoder.width, values),
    ]
