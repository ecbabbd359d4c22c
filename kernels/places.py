"""Where each patch stands in a view's list of patch ids: the list inverted.

With it a kernel may own patches, load once what belongs to them (pixels, positions), and find their rows in every view
without a search. A program inverts the list of one view: each id is read once, each place written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimae.kernels.runtime import jit, launch, tl


def check_ids(name: str, ids: Tensor, like: Tensor, patches: int) -> None:
    """Raise ValueError unless `ids` (B, N, K) can list distinct patches of the views of `like` (B, N, ...)."""
    if ids.dim() != 3 or ids.shape[:2] != like.shape[:2]:
        raise ValueError(f"{name} is (B, N, ids) with B, N = {tuple(like.shape[:2])}, not {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != like.device:
        raise ValueError(f"{name} is {ids.dtype} on {ids.device}: legal is int32 or int64 on {like.device}")
    if ids.shape[2] > patches:
        raise ValueError(f"{name} lists {ids.shape[2]} ids a view, of {patches} patches")


def places(ids: Tensor, patches: int) -> Tensor:
    """One launch: ids (B, N, K) distinct within a view, in [0, patches) -> (B, N, patches) int32, the k at which the
    view lists the patch, or -1."""
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
    # A place may lie where another thread has just written -1.
    tl.debug_barrier()
    for start in range(0, listed, BLOCK):
        place = start + lane
        patch = tl.load(ids + place, mask=place < listed, other=-1)
        tl.store(inverse + patch, place, mask=(patch >= 0) & (patch < patches))
