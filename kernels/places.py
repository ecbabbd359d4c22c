"""The place of each patch in a view's list of patch ids: the inverted list.

With it a kernel can own patches, load their data once (pixels, positions), and find their rows in every view without a
search. A program inverts the list of one view: each id is read once, and each place is written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimae.kernels.runtime import jit, launch, tl


def check_ids(name: str, ids: Tensor, like: Tensor, patches: int) -> None:
    """Raise ValueError unless `ids` (B, N, K) can be lists of distinct patches for the views of `like` (B, N, ...)."""
    if ids.dim() != 3 or ids.shape[:2] != like.shape[:2]:
        raise ValueError(f"{name} is (B, N, ids) with B, N = {tuple(like.shape[:2])}, not {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != like.device:
        raise ValueError(f"{name} is {ids.dtype} on {ids.device}: legal is int32 or int64 on {like.device}")
    if ids.shape[2] > patches:
        raise ValueError(f"{name} lists {ids.shape[2]} ids a view, of {patches} patches")


def places(ids: Tensor, patches: int) -> Tensor:
    """Return (B, N, patches) int32: the k at which a view lists a patch, or -1. It takes one launch.

    ids (B, N, K) are in [0, patches), and distinct within a view.
    """
    inverse = torch.empty(*ids.shape[:2], patches, dtype=torch.int32, device=ids.device)
    launch(
        _invert,
        (ids.shape[0] * ids.shape[1],),
        warps=2,
        ids=ids.contiguous(),
        inverse=inverse,
        listed=ids.shape[2],
        patches=patches,
        BLOCK=256,
    )
    return inverse


@jit
def _invert(ids, inverse, listed, patches, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    view = tl.program_id(0).to(tl.int64)
    ids += view * listed
    inverse += view * patches
    lane = tl.arange(0, BLOCK)
    for start in range(0, patches, BLOCK):
        tl.store(inverse + start + lane, tl.full((BLOCK,), -1, tl.int32), mask=start + lane < patches)
    # A place may be at an address where another thread has just written -1.
    tl.debug_barrier()
    for start in range(0, listed, BLOCK):
        place = start + lane
        patch = tl.load(ids + place, mask=place < listed, other=-1)
        tl.store(inverse + patch, place, mask=(patch >= 0) & (patch < patches))
