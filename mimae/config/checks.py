"""Checks of settings that depend on each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

from mimae.config.layers import text
from mimae.config.recipe import ClassifyRecipe, Recipe, Resolved, flat
from mimae.model.geometry import Grid
from mimae.model.settings import MASK_KINDS
from mimae.objective.terms import active
from mimae.optim import resolution
from mimae.ranks.place import number

Check = Callable[[Resolved[Any]], Iterator[str]]
"""Function that yields a message for each problem that it finds."""

CHECKS: list[tuple[tuple[str, ...], Check]] = []
"""Registered checks: the sections that a check reads, which have to be valid, and the check."""


def _check(*sections: str) -> Callable[[Check], Check]:
    """Register a check that reads these sections."""

    def register(check: Check) -> Check:
        CHECKS.append((sections, check))
        return check

    return register


@_check("data", "model")
def _patches_fit(resolved: Resolved[Any]) -> Iterator[str]:
    patch, size_hw = resolved.recipe.model.patch_size, resolved.recipe.data.size_hw
    if any(side % patch for side in size_hw):
        near = " x ".join(str(max(round(side / patch), 1) * patch) for side in size_hw)
        yield (
            f"{_described(resolved, 'data.image_size')}: each side must be divisible by "
            f"{_described(resolved, 'model.patch_size')}; the nearest is {near}"
        )


@_check("data", "masking", "model")
def _masks_fit(resolved: Resolved[Any]) -> Iterator[str]:
    yield from _masks_fit_in(resolved, resolved.recipe.data.size_hw, "data.image_size")


@_check("data", "masking", "model", "schedule")
def _stages_fit(resolved: Resolved[Any]) -> Iterator[str]:
    recipe, patch, last = resolved.recipe, resolved.recipe.model.patch_size, resolved.recipe.data.size_hw
    sizes = resolution.sizes(recipe.schedule, last)
    told, image_size = _described(resolved, "schedule.resolution"), _described(resolved, "data.image_size")
    if sizes[-1] != last:
        yield (
            f"{told}: the run ends with images of {resolution.in_words(sizes[-1])}, and {image_size} is another size; "
            "legal is one size for both"
        )
        return
    does_last_fail = any(_masks_fit_in(resolved, last, "data.image_size"))  # `_masks_fit` tells it.
    for size, following in pairwise(sizes):
        words = resolution.in_words(size)
        if size[0] >= following[0] or size[1] >= following[1]:
            yield f"{told}: {words} before {resolution.in_words(following)}; legal are sizes that grow"
        elif size[0] * last[1] != size[1] * last[0]:
            yield f"{told}: {words} has another shape than {image_size}, and crops would be distorted"
        elif any(side % patch for side in size):
            yield f"{told}: each side of {words} must be divisible by {_described(resolved, 'model.patch_size')}"
        elif not does_last_fail and (found := [*_masks_fit_in(resolved, size, "schedule.resolution")]):
            yield from found
            return  # Larger sizes add nothing: they are legal, or have the same problem.


@_check("finetune", "schedule")
def _stages_are_for_pretraining(resolved: Resolved[Any]) -> Iterator[str]:
    if resolved.recipe.schedule.resolution:
        yield f"{_described(resolved, 'schedule.resolution')}: applies to pretraining; legal here is []"


def _masks_fit_in(resolved: Resolved[Any], size_hw: tuple[int, int], key: str) -> Iterator[str]:
    """Yield why the masks do not fit in images of `size_hw`, which `key` asks for."""
    recipe, patch = resolved.recipe, resolved.recipe.model.patch_size
    if any(side % patch for side in size_hw):
        return
    patches = Grid.of(size_hw, patch).patches
    if patches < 2:
        yield (
            f"{_described(resolved, key)}: {resolution.in_words(size_hw)} are one patch "
            f"({_described(resolved, 'model.patch_size')}); an image needs at least 2, one visible and one hidden"
        )
        return
    visible = recipe.masking.num_visible(patches)
    if MASK_KINDS[recipe.masking.kind].is_disjoint and recipe.masking.num_masks * visible > patches:
        mends = ["fewer masks", "a higher masking.ratio"][: 1 + (visible > 1)]
        mends += ["a larger size in schedule.resolution"] if key == "schedule.resolution" else []
        mends += [f"masking.kind={name}" for name, kind in MASK_KINDS.items() if not kind.is_disjoint]
        yield (
            f"{_described(resolved, 'masking.num_masks')}: at most {patches // visible} masks that show {visible} "
            f"patches each ({_described(resolved, 'masking.ratio')}) are disjoint in an image of {patches} "
            f"({resolution.in_words(size_hw)}); legal are {', '.join(mends[:-1])} or {mends[-1]}"
        )


@_check("model")
def _encoder_shape(resolved: Resolved[Any]) -> Iterator[str]:
    return _transformer_shape(resolved, "model")


@_check("model")
def _stream_is_not_below_the_products(resolved: Resolved[Any]) -> Iterator[str]:
    recipe = resolved.recipe
    if recipe.model.residual == "bf16" and recipe.precision != "bf16":
        yield (
            f"{_described(resolved, 'model.residual')}: the residual stream cannot be less precise than the products, "
            f"{_described(resolved, 'precision')}; legal is model.residual=fp32, or precision=bf16"
        )


@_check("decoder")
def _decoder_shape(resolved: Resolved[Any]) -> Iterator[str]:
    return _transformer_shape(resolved, "decoder")


def _transformer_shape(resolved: Resolved[Any], section: Literal["model", "decoder"]) -> Iterator[str]:
    settings = getattr(resolved.recipe, section)
    if settings.width % settings.heads:
        divisors = [str(n) for n in range(1, min(settings.width, 64) + 1) if settings.width % n == 0]
        yield (
            f"{_described(resolved, f'{section}.heads')}: does not divide {_described(resolved, f'{section}.width')}; "
            f"legal are {', '.join(divisors)}"
        )
    if settings.width % 4:
        yield f"{_described(resolved, f'{section}.width')}: sin-cos positions need a multiple of 4"


@_check("finetune", "model")
def _frozen_blocks(resolved: Resolved[Any]) -> Iterator[str]:
    freeze, depth = resolved.recipe.finetune.freeze, resolved.recipe.model.depth
    if isinstance(freeze, int) and freeze > depth:
        yield (
            f"{_described(resolved, 'finetune.freeze')}: the encoder has {depth} blocks "
            f"({_described(resolved, 'model.depth')}); legal is at most {depth}, none, or all"
        )


@_check("finetune", "head")
def _batch_norm_needs_a_frozen_encoder(resolved: Resolved[Any]) -> Iterator[str]:
    if resolved.recipe.head.norm == "batch_norm" and resolved.recipe.finetune.freeze != "all":
        yield (
            f"{_described(resolved, 'head.norm')}: is only for frozen encoders; legal with "
            f"{_described(resolved, 'finetune.freeze')} are fc_norm and none"
        )


@_check("schedule")
def _batch_splits(resolved: Resolved[Any]) -> Iterator[str]:
    schedule = resolved.recipe.schedule
    ranks = number(os.environ, "WORLD_SIZE", 1, least=1)
    parts = ranks * schedule.accumulate
    if schedule.batch_size % parts:
        below = schedule.batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        yield (
            f"{_described(resolved, 'schedule.batch_size')}: must be divisible by {parts} = ranks ({ranks}) x "
            f"{_described(resolved, 'schedule.accumulate')}; the nearest is {near}"
        )


@_check("schedule")
def _warmup_ends(resolved: Resolved[Any]) -> Iterator[str]:
    if resolved.recipe.schedule.warmup_epochs > resolved.recipe.schedule.epochs:
        yield (
            f"{_described(resolved, 'schedule.warmup_epochs')}: is longer than the run; "
            f"legal is at most {_described(resolved, 'schedule.epochs')}"
        )


@_check("masking", "objective")
def _siblings(resolved: Resolved[Any]) -> Iterator[str]:
    if resolved.recipe.masking.num_masks > 1:
        return
    for key in _weights_of_terms_that_compare("views", resolved.recipe):
        yield (
            f"{_described(resolved, key)}: this term compares the views of an image, but there is only one: "
            f"{_described(resolved, 'masking.num_masks')}; legal are at least 2 masks, or {key}=0"
        )


@_check("decoder", "masking")
def _next_view(resolved: Resolved[Any]) -> Iterator[str]:
    masking = resolved.recipe.masking
    is_disjoint = MASK_KINDS[masking.kind].is_disjoint
    if resolved.recipe.decoder.predict != "next_view" or (is_disjoint and masking.num_masks > 1):
        return
    disjoint = " or ".join(name for name, kind in MASK_KINDS.items() if kind.is_disjoint)
    yield (
        f"{_described(resolved, 'decoder.predict')}: the targets of a view are patches that another view shows; "
        f"legal are at least 2 {disjoint} masks (here {_described(resolved, 'masking.kind')}, "
        f"{_described(resolved, 'masking.num_masks')}), or decoder.predict=hidden"
    )


@_check("schedule", "objective")
def _other_images(resolved: Resolved[Any]) -> Iterator[str]:
    recipe = resolved.recipe
    if recipe.schedule.batch_size // recipe.schedule.accumulate > 1:
        return
    for key in _weights_of_terms_that_compare("images", recipe):
        yield (
            f"{_described(resolved, key)}: this term compares the images of a micro-batch, which has only one "
            f"({_described(resolved, 'schedule.batch_size')}, {_described(resolved, 'schedule.accumulate')}); "
            f"legal are at least 2 images, or {key}=0"
        )


def _weights_of_terms_that_compare(what: Literal["views", "images"], recipe: Recipe) -> list[str]:
    """Return the keys of the weights of all active terms that compare views, or that compare images."""
    return [f"objective.{term.weight}" for term in active(recipe.objective) if what in term.compares]


@_check("checkpoint", "telemetry", "data")
def _best_is_measured(resolved: Resolved[Any]) -> Iterator[str]:
    recipe = resolved.recipe
    if recipe.checkpoint.best not in (None, *recipe.measures):
        yield f"{_described(resolved, 'checkpoint.best')}: legal is {' or '.join(recipe.measures)}, or null"
        return
    if recipe.checkpoint.best is None or (recipe.telemetry.probe_every_epochs and recipe.data.val_path):
        return
    yield (
        f"{_described(resolved, 'checkpoint.best')}: is measured on data.val_path every "
        "telemetry.probe_every_epochs epochs, "
        f"here {_described(resolved, 'data.val_path')} and {_described(resolved, 'telemetry.probe_every_epochs')}; "
        "legal is null, or set both"
    )


@_check("segment", "model")
def _maps_end_with_the_last_block(resolved: Resolved[Any]) -> Iterator[str]:
    blocks, depth = resolved.recipe.segment.blocks, resolved.recipe.model.depth
    if blocks is not None and blocks[-1] != depth - 1:
        yield (
            f"{_described(resolved, 'segment.blocks')}: the last number has to be that of the encoder's last block, "
            f"{depth - 1} ({_described(resolved, 'model.depth')}); later blocks would learn nothing"
        )


@_check("segment", "data")
def _windows_are_not_cropped_again(resolved: Resolved[Any]) -> Iterator[str]:
    scale = resolved.recipe.data.crop_scale
    if scale not in (None, type(resolved.recipe.data)().crop_scale):
        yield (
            f"{_described(resolved, 'data.crop_scale')}: is not used in segmentation, whose windows are cut by "
            f"{_described(resolved, 'segment.scale')}; legal is null"
        )


@_check("evaluation")
def _whole_images_are_evaluated(resolved: Resolved[Any]) -> Iterator[str]:
    if not isinstance(resolved.recipe, ClassifyRecipe) and resolved.recipe.evaluation.crop != 1:
        yield (
            f"{_described(resolved, 'evaluation.crop')}: is for classifiers; task={resolved.recipe.task} is evaluated "
            "on whole images; legal is 1.0"
        )


@_check("data", "finetune")
def _windows_are_decoded_exactly(resolved: Resolved[Any]) -> Iterator[str]:
    if not isinstance(resolved.recipe, ClassifyRecipe) and resolved.recipe.data.decode != "exact":
        yield f"{_described(resolved, 'data.decode')}: is for pretraining and classification; legal here is exact"


@_check("detect", "model")
def _strides_are_whole(resolved: Resolved[Any]) -> Iterator[str]:
    if resolved.recipe.model.patch_size % 4:
        yield (
            f"{_described(resolved, 'model.patch_size')}: the finest map of a detector has a quarter of it as its "
            "stride, in whole pixels; legal is a multiple of 4"
        )


def _described(resolved: Resolved[Any], key: str) -> str:
    """Return `key = value (origin)`."""
    return f"{key} = {text(flat(resolved.recipe)[key])} ({resolved.origins[key]})"
