"""Disjoint views of each image, without argsort and without the host (method 1).

This is the form in Triton; csrc/orthogonal_masks.cpp and .cu are those in C++ and CUDA. One program draws the masks of
one image. It makes the L words of the image's stream and sorts the patches by (word, patch); a second sort, by patch,
brings the ranks into image order. The rank of a patch determines its view, and a running count its place in the list.
The id is read once and each list is written once, ascending: neighbouring lanes write neighbouring places.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mimae.kernels import native, reference
from mimae.kernels.philox import WORDS_OF_A_STREAM
from mimae.kernels.runtime import Impl, chosen, jit, launch, tl

LARGEST = 4096
"""Largest number of patches that triton sorts. Plain PyTorch draws the masks of larger images."""

_PATCHES_OF_WARP, _WARPS = 256, 8


def orthogonal_masks(
    seed: int, epoch: int, sample_ids: Tensor, num_patches: int, num_views: int, num_visible: int, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return visible and hidden patches of every view: exactly the ids of `reference.orthogonal_masks`.

    Raises ValueError if N K > L, or for an epoch outside [0, 2^32).
    """
    if not 0 < num_visible * num_views <= num_patches:
        raise ValueError(
            f"{num_views} disjoint views of {num_visible} patches need {num_views * num_visible} patches, "
            f"the image has {num_patches}"
        )
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch {epoch}: legal is 0 to 2^32 - 1")
    choice = chosen("orthogonal_masks", sample_ids, impl)
    if choice == "reference" or num_patches > (LARGEST if choice == "triton" else WORDS_OF_A_STREAM):
        return reference.orthogonal_masks(seed, epoch, sample_ids, num_patches, num_views, num_visible)
    signed_seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    draw = _orthogonal_masks if choice == "triton" else torch.ops.mimae.orthogonal_masks_native
    return draw(signed_seed, epoch, sample_ids.to(torch.int64), num_patches, num_views, num_visible)


def launch_forward(
    seed: int, epoch: int, sample_ids: Tensor, num_patches: int, num_views: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Run `orthogonal_masks` in one launch. The seed is in two's complement."""
    visible, hidden = _empty_lists(sample_ids, num_patches, num_views, num_visible)
    size = max(4, 1 << (num_patches - 1).bit_length())
    launch(
        _draw,
        (sample_ids.shape[0],),
        warps=min(max(1, size // _PATCHES_OF_WARP), _WARPS),
        sample_ids=sample_ids.to(torch.int64).contiguous(),
        visible=visible,
        hidden=hidden,
        seed=seed,
        epoch=epoch,
        patches=num_patches,
        views=num_views,
        shown=num_visible,
        PURPOSE=reference._MASK_PURPOSE,
        SIZE=size,
    )
    return visible, hidden


@torch.library.custom_op("mimae::orthogonal_masks", mutates_args=())
def _orthogonal_masks(
    seed: int, epoch: int, sample_ids: Tensor, num_patches: int, num_views: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    return launch_forward(seed, epoch, sample_ids, num_patches, num_views, num_visible)


def _empty_lists(sample_ids: Tensor, num_patches: int, num_views: int, num_visible: int) -> tuple[Tensor, Tensor]:
    shape = (sample_ids.shape[0], num_views)
    visible = sample_ids.new_empty(*shape, num_visible, dtype=torch.int32)
    return visible, sample_ids.new_empty(*shape, num_patches - num_visible, dtype=torch.int32)


@_orthogonal_masks.register_fake
def _fake(seed: int, epoch: int, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_lists(*others)


if native.LOADED:
    torch.library.register_fake("mimae::orthogonal_masks_native", _fake)


# Otherwise the epochs 0, 1 and 2 would each have a separate binary.
@partial(jit, do_not_specialize=("seed", "epoch"))
def _draw(  # type: ignore[no-untyped-def]
    sample_ids, visible, hidden, seed: tl.int64, epoch: tl.int64, patches, views, shown,
    PURPOSE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_ids + image)
    block = tl.arange(0, SIZE // 4).to(tl.uint32) + (PURPOSE << 24)
    first, second, third, fourth = tl.philox(
        seed, block, epoch.to(tl.uint32), sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    )
    # Word 4 i + j of the stream is output j of block i.
    word = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [SIZE])
    patch = tl.arange(0, SIZE)
    # The filler is larger than every word, so that places past the image's end are ranked last.
    word = tl.where(patch < patches, word.to(tl.uint64), 0xFFFFFFFF)
    ranked = tl.sort((word << 32) | patch.to(tl.uint64))
    ranked_patch = (ranked & 0xFFFFFFFF).to(tl.int32)
    rank = tl.sort(ranked_patch * SIZE + patch) % SIZE
    for view in range(views):
        sequence = image * views + view
        is_shown = (rank >= view * shown) & (rank < (view + 1) * shown)
        count = tl.cumsum(is_shown.to(tl.int32))
        tl.store(visible + sequence * shown + count - 1, patch, mask=is_shown)
        is_hidden = (patch < patches) & (is_shown == 0)
        tl.store(hidden + sequence * (patches - shown) + patch - count, patch, mask=is_hidden)
