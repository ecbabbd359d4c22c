"""Time of a training step on one H100, predicted from counted operations and bytes. No GPU takes part in it.

A matrix product and attention take their operations over a share of the peak. All other work of the blocks takes the
bytes that it moves, as counted by `moved`, over a share of the memory's bandwidth; so do the fused ops with their least
bytes, and the optimizer. These parts follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mimae.bench.ops.traffic import H100_BYTES_PER_S
from mimae.bench.step.moved import KINDS, Way, count
from mimae.bench.step.version import check_version, name_of
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry
from mimae.outside.progress import track
from mimae.plan.flops import image_flops
from mimae.plan.gpus import GPUS, peak_flops
from mimae.plan.memory import parameters

PRODUCTS = 0.62
"""Assumed share of the peak that matrix products reach."""

ATTENTION = {64: 0.25, 32: 0.125}
"""Assumed share of the peak that attention over at most 197 tokens reaches, by the width of a head. With heads of 32 it
computes twice as many exponentials for the same operations."""

MEMORY = 0.8
"""Assumed share of the bandwidth that kernels without products reach."""

BACKWARD_OF_ATTENTION = 2.5
"""Operations of attention's backward over those of its forward: it computes the scores again."""

OPTIMIZER = 30
"""Bytes for each parameter and step: AdamW reads weight, gradient and two moments and writes three of them, in fp32;
autocast writes the weight's bf16 copy."""

IMAGES = 256
"""Images of a step on one GPU."""

WAYS = (
    *(Way(part, compiled, how) for part in ("block", "attention", "mlp") for compiled in (False, True)
      for how in ("none", "selective")),
    Way("block", True, "none", "bf16"),
    Way("block", True, "selective", "bf16"),
)  # fmt: skip
"""Ways of running a block that are counted."""

STEPS: tuple[tuple[str, ...], ...] = (
    (),
    ("model.checkpointing=selective",),
    ("model.residual=bf16",),
    ("decoder.heads=8",),
    ("decoder.predict=next_view",),
    ("decoder.predict=next_view", "decoder.heads=8", "model.residual=bf16"),
)
"""Steps of vit_base_400ep that are predicted, as overrides of its settings."""

Counts = Mapping[str, float]
"""Bytes of a token and channel by kind, see `moved`."""


class Budget(NamedTuple):
    """Predicted milliseconds of a step by kind of work."""

    products: float
    attention: float
    other: float
    """Norms, GELU, sums and casts of the blocks."""
    ops: float
    """The fused ops between pixels and losses."""
    optimizer: float

    @property
    def step(self) -> float:
        """Milliseconds of the whole step."""
        return sum(self)


def measure(earlier: Path | None) -> dict[str, Any]:
    """Count every way of running a block, and with `earlier` the compiled block of another version's checkout.

    Raises UserError if that has no version of this package.
    """
    if earlier is not None:
        check_version(earlier)
    rows = [{**way._asdict(), **count(way)} for way in track(WAYS, "blocks", len(WAYS))]
    return {
        "bench": "budget",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"torch": metadata.version("torch")},
        "unit": "bytes of a token and channel, in a forward and a backward in bf16",
        "counts": rows,
        "earlier": None if earlier is None else {"version": name_of(earlier), **count(Way(), earlier)},
    }


def predict(recipe: Recipe, counts: Counts, ops_bytes: float) -> Budget:
    """Return the time of the recipe's step on one GPU. `ops_bytes`: least bytes of the fused ops for an image."""
    peak = peak_flops(GPUS["h100"].name, "bf16")
    assert peak is not None
    model, decoder, images = recipe.model, recipe.decoder, recipe.schedule.batch_size
    views = images * recipe.masking.num_masks
    tokens, _, queries = _tokens(recipe)
    attention = attention_flops(recipe)
    products = 3 * (images * image_flops(recipe) - views * sum(flops for flops, _ in attention))
    moved = views * (model.depth * tokens * model.width + queries * decoder.width)
    memory = MEMORY * H100_BYTES_PER_S
    return Budget(
        1e3 * products / (PRODUCTS * peak),
        1e3 * sum((1 + BACKWARD_OF_ATTENTION) * views * flops / (ATTENTION[head] * peak) for flops, head in attention),
        1e3 * moved * counts["other"] / memory,
        1e3 * images * ops_bytes / memory,
        1e3 * OPTIMIZER * parameters(recipe).total / memory,
    )


def attention_flops(recipe: Recipe) -> list[tuple[int, int]]:
    """Return, for encoder and decoder, the FLOPs of attention in a view's forward and the width of a head.

    The decoder has self attention.
    """
    assert recipe.decoder.attention == "self"
    model, decoder = recipe.model, recipe.decoder
    tokens, of_decoder, queries = _tokens(recipe)
    return [
        (4 * model.depth * tokens**2 * model.width, model.width // model.heads),
        (4 * queries * of_decoder * decoder.width, decoder.width // decoder.heads),
    ]


def _tokens(recipe: Recipe) -> tuple[int, int, int]:
    """Return a view's tokens in the encoder and in the decoder, and the queries of all blocks of the decoder.

    The decoder's last block has queries for the targets only.
    """
    sizes = geometry(recipe)
    of_decoder = 1 + sizes.visible + sizes.targets
    return 1 + sizes.visible, of_decoder, (recipe.decoder.depth - 1) * of_decoder + sizes.targets


def render(result: Mapping[str, Any], kept: Mapping[str, Any], traffic: Mapping[str, Any]) -> str:
    """Return the page of a result. `kept` and `traffic`: the contents of those files of bench/results."""
    lines = _HEAD.splitlines()
    # Attention that is computed again is not among the least.
    least = {
        row["part"]: row["products"] + row["attention"] for row in result["counts"] if row["checkpointing"] == "none"
    }
    for row in result["counts"]:
        run = "compiled" if row["compiled"] else "operator by operator"
        cells = _cells(row, least[row["part"]])
        lines.append(f"| {_PARTS[row['part']]} | {run} | {row['checkpointing']} | {row['residual']} | {cells} |")
    if earlier := result["earlier"]:
        lines.append(
            f"| whole, of version {earlier['version']} | compiled | none | fp32 | {_cells(earlier, least['block'])} |"
        )
    eager, compiled = kept["eager"]["sdpa"], kept["compiled, sdpa, by activation_memory_budget"]
    assumed = (
        f"{PRODUCTS:.0%} of the peak for matrix products, {ATTENTION[64]:.0%} for attention with heads of 64,\n"
        f"{ATTENTION[32]:.1%} with heads of 32, and {MEMORY:.0%} of {H100_BYTES_PER_S / 1e12:g} TB/s for all other work"
    )
    lines += [
        "",
        f"For backward a block keeps {eager['none']:.1f} bytes of a token and channel, with `selective` "
        f"{eager['selective']:.1f}; compiled {compiled['1.0']:.1f}, with `selective` {compiled['0.7']:.1f}",
        "([file](../bench/results/kept-bytes.json)). 12 bytes of a compiled block's other work are copies: torch's",
        "attention returns the gradients of queries, keys and values in three tensors of 2 bytes, which are read and",
        "written into one. In a half alone, `selective` has so little else to recompute that the compiler recomputes",
        "attention too.",
        "",
        "## The step",
        "",
        f"`vit_base_400ep` with {IMAGES} images on one H100, blocks compiled, in milliseconds. Assumed are",
        f"{assumed.replace('%', ' %')}. MFU counts the operations of the step's own settings.",
        "Not counted are launches, waiting, communication, the norms outside of the blocks, and the work of the",
        "decoder's last block on tokens that are no targets. The fused ops are those of the recipe in every row.",
        "",
        "| settings | products | attention | other work of blocks | fused ops | optimizer | step | images/s | MFU |",
        "| --- |" + " ---: |" * 8,
    ]
    rows: list[tuple[str, Recipe, Counts]] = []
    for overrides in STEPS:
        recipe = _recipe(overrides)
        name = " ".join(f"`{each}`" for each in overrides) or "the recipe"
        rows.append((name, recipe, counts_of(recipe, result)))
    if earlier:
        rows.insert(0, (f"version {earlier['version']}", _recipe(()), earlier))
    for name, recipe, moved in rows:
        budget = predict(recipe, moved, ops_bytes(recipe, traffic))
        rate, mfu = speed(recipe, budget)
        times = " | ".join(f"{each:.1f}" for each in (*budget, budget.step))
        lines.append(f"| {name} | {times} | {rate:,.0f} | {100 * mfu:.0f} % |")
    return "\n".join(lines) + "\n"


def counts_of(recipe: Recipe, result: Mapping[str, Any]) -> Counts:
    """Return the bytes that a compiled block of the recipe moves, from a result of `measure`."""
    wanted = Way(checkpointing=recipe.model.checkpointing, residual=recipe.model.residual)
    return next(row for row in result["counts"] if all(row[key] == value for key, value in wanted._asdict().items()))


def speed(recipe: Recipe, budget: Budget) -> tuple[float, float]:
    """Return images per second and MFU of a predicted step."""
    rate = recipe.schedule.batch_size / budget.step * 1e3
    return rate, 3 * rate * image_flops(recipe) / (peak_flops(GPUS["h100"].name, "bf16") or 1)


_HEAD = """\
# The time of a step on an H100, predicted

This page is generated by `mimae bench budget --render` from `bench/results/budget.json`; do not edit it. **Its times
are predictions**: operations and bytes are counted without a GPU, and rates are assumed. [gpu-day.md](gpu-day.md) is
the page for measurements, beside which it has these predictions at the settings of its stages.
`mimae plan` assumes 45 % of the peak for the whole step (`--share`), so its times are shorter than those here.

## What a block moves and keeps

The table has bytes of a token and channel in a forward and a backward in bf16 (D = 192, 25,600 tokens, so that the
parameters are less than 1 % of them). An operator that runs by itself reads its inputs and writes its results. A
kernel of torch's compiler reads and writes only what enters and leaves it; the compiler fuses here as it does for a
CPU. The least is what products and attention move: at best, all other work would be part of their kernels.

| block | run | checkpointing | residual | products | attention | all other | together, of the least |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: |
"""

_PARTS = {"block": "whole", "attention": "half with attention", "mlp": "half with MLP"}


def _cells(row: Counts, least: float) -> str:
    moved = [row[kind] for kind in KINDS]
    return " | ".join([*(f"{each:.0f}" for each in moved), f"{sum(moved) / least:.2f}"])


def _recipe(overrides: Sequence[str]) -> Recipe:
    return load_recipe("vit_base_400ep", [f"schedule.batch_size={IMAGES}", *overrides]).recipe


def ops_bytes(recipe: Recipe, traffic: Mapping[str, Any]) -> float:
    """Return the least bytes of the fused ops for an image. `traffic`: the contents of traffic.json."""
    model = {768: "ViT-B/16", 1024: "ViT-L/16"}[recipe.model.width]
    sizes = ("L=196", model, "decoder 512", "patch 16", f"{model} B=4096")
    rows = [row for row in traffic["traffic"] if row["size"] in sizes]
    return sum(each["floor_bytes"] / row["batch"] for row in rows for each in row["passes"])
