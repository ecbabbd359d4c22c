"""The decoder's input, class | visible | targets with their positions, in one write.

A program owns a few patches. It loads their positions once and then writes their rows in one view after the other, at
the places in the inverted lists (`places`): for a visible patch its token plus its position, for a target the sum of
mask token and position, which is computed once. The class token counts as a patch before the first. Backward reads the
gradient once: rows of tokens are copied, and rows of targets are summed. The sums of the programs are added in order,
so that equal inputs give equal bits.

Counted traffic at ViT-B (bf16 tokens, fp32 positions, Dd 512): forward moves tokens, ids and rows once, in addition the
positions once for every 32 views and 4 KB of places for each view. This is 1.04 of the floor, or 1.08 if the targets
are the next view's patches. Backward moves both gradients once, and the programs' sums: 1.01.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.places import check_ids, places
from mimae.kernels.runtime import Impl, chosen, jit, launch, tl

_VIEWS = 32
"""Number of views of a program, which share the loaded positions."""
_TILE = 2048
_COLUMNS = 512
_GRADIENT_ROWS = 256
"""Number of rows of a program in backward, for one sum."""


def fill_masked(
    tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor, impl: Impl = "auto"
) -> Tensor:
    """Return the decoder's input: class | visible | targets, each with its position, in that order.

    tokens (B, N, 1+K, Dd), visible (B, N, K), targets (B, N, M), mask_token (Dd,), pos (1+L, Dd), fixed
    -> (B, N, 1+K+M, Dd) in the dtype to which tokens, mask_token and pos promote. Ids are int32 or int64 in [0, L), and
    distinct within a list of a view. float64 runs in plain PyTorch.
    Raises ValueError for other shapes, dtypes and devices, for a `pos` that requires grad, and for float64 in triton.
    """
    _check(tokens, visible, targets, mask_token, pos)
    is_double = _promoted(tokens, mask_token, pos) == torch.float64
    if is_double and impl == "triton":
        raise ValueError("fill_masked in triton is for fp32, fp16 and bf16, not for float64")
    if is_double or chosen("fill_masked", tokens, impl) == "reference":
        return reference.fill_masked(tokens, visible, targets, mask_token, pos)
    return _fill_masked(tokens, visible, targets, mask_token, pos)


def _check(tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor) -> None:
    if tokens.dim() != 4 or tokens.shape[2] == 0:
        raise ValueError(f"tokens are (B, N, 1+K, Dd), not {tuple(tokens.shape)}")
    shown, width = tokens.shape[2] - 1, tokens.shape[3]
    if pos.dim() != 2 or pos.shape[0] == 0 or pos.shape[1] != width or mask_token.shape != (width,):
        raise ValueError(
            f"with tokens {tuple(tokens.shape)} go pos (1+L, {width}) and mask_token ({width},), not "
            f"{tuple(pos.shape)} and {tuple(mask_token.shape)}"
        )
    for each in (tokens, mask_token, pos):
        if not each.is_floating_point() or each.device != tokens.device:
            raise ValueError(f"{each.dtype} on {each.device}: legal is floating point on {tokens.device}")
    if pos.requires_grad:
        raise ValueError("pos requires grad, but positions are fixed: there is no gradient for them")
    check_ids("visible", visible, tokens, pos.shape[0] - 1)
    check_ids("targets", targets, tokens, pos.shape[0] - 1)
    if visible.shape[2] != shown:
        raise ValueError(f"{shown} visible tokens a view, but {visible.shape[2]} ids")


def _promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for each in tensors[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype


@torch.library.custom_op("mimae::fill_masked", mutates_args=())
def _fill_masked(tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    return launch_forward(tokens, visible, targets, mask_token, pos)


@_fill_masked.register_fake
def _empty_rows(tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    B, N, shown, width = tokens.shape
    return tokens.new_empty(B, N, shown + targets.shape[2], width, dtype=_promoted(tokens, mask_token, pos))


@torch.library.custom_op("mimae::fill_masked_backward", mutates_args=())
def _fill_masked_backward(
    d_rows: Tensor, shown: int, dtype: torch.dtype, mask_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return launch_backward(d_rows, shown, dtype, mask_dtype)


@_fill_masked_backward.register_fake
def _(d_rows: Tensor, shown: int, dtype: torch.dtype, mask_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, N, _, width = d_rows.shape
    return d_rows.new_empty(B, N, shown, width, dtype=dtype), d_rows.new_empty(width, dtype=mask_dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    tokens, _, _, mask_token, _ = inputs
    ctx.shown, ctx.dtype, ctx.mask_dtype = tokens.shape[2], tokens.dtype, mask_token.dtype


def _backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
    d_tokens, d_mask_token = _fill_masked_backward(d_rows, ctx.shown, ctx.dtype, ctx.mask_dtype)
    return d_tokens, None, None, d_mask_token, None


_fill_masked.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Run `fill_masked` in three launches. All groups of 32 views are processed in the same way."""
    rows = _empty_rows(tokens, visible, targets, mask_token, pos)
    (B, N, _, width), patches = tokens.shape, pos.shape[0] - 1
    columns, owned = _tile(width)
    launch(
        _fill,
        (-(-(1 + patches) // owned), -(-(B * N) // _VIEWS), -(-width // columns)),
        tokens=tokens.contiguous(),
        shown_places=places(visible, patches),
        target_places=places(targets, patches),
        mask_token=mask_token.contiguous(),
        pos=pos.contiguous(),
        rows=rows,
        views=B * N,
        patches=patches,
        shown=visible.shape[2],
        targets=targets.shape[2],
        WIDTH=width,
        VIEWS=_VIEWS,
        OWNED=owned,
        COLUMNS=columns,
        RUN=16 // rows.element_size(),
    )
    return rows


def launch_backward(d_rows: Tensor, shown: int, dtype: torch.dtype, mask_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens and of the mask token, in one launch and a sum.

    The gradient of the rows is (B, N, T, Dd). The tokens are the first `shown` rows of each view, in `dtype`; the mask
    token (Dd,) is in `mask_dtype`.
    """
    B, N, length, width = d_rows.shape
    d_tokens = d_rows.new_empty(B, N, shown, width, dtype=dtype)
    count = B * N * length
    columns, together = _tile(width)
    sums = d_rows.new_empty(-(-count // _GRADIENT_ROWS), width, dtype=torch.float32)
    launch(
        _split,
        (sums.shape[0], -(-width // columns)),
        d_rows=d_rows.contiguous(),
        d_tokens=d_tokens,
        sums=sums,
        count=count,
        length=length,
        shown=shown,
        WIDTH=width,
        SHARE=_GRADIENT_ROWS,
        ROWS=2 * together,
        COLUMNS=columns,
        RUN=16 // d_rows.element_size(),
    )
    return d_tokens, sums.sum(0).to(mask_dtype)


def _tile(width: int) -> tuple[int, int]:
    """Return the numbers of columns and rows of a tile."""
    columns = min(_COLUMNS, max(16, 1 << (width - 1).bit_length()))
    return columns, _TILE // columns


@jit
def _fill(  # type: ignore[no-untyped-def]
    tokens, shown_places, target_places, mask_token, pos, rows, views, patches, shown, targets,
    WIDTH: tl.constexpr, VIEWS: tl.constexpr, OWNED: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Write the rows of OWNED patches in VIEWS views. The class token is patch -1, before place 0."""
    patch = tl.program_id(0) * OWNED + tl.arange(0, OWNED) - 1
    is_class = patch < 0
    is_patch = (patch >= 0) & (patch < patches)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < WIDTH)[None, :]
    # Tokens are read in runs as long as those of the rows, so that no thread waits for another's.
    token_column = tl.max_contiguous(column, RUN)
    at = pos + (1 + patch)[:, None] * WIDTH + column[None, :]
    positions = tl.load(at, mask=(is_class | is_patch)[:, None] & inside, other=0).to(tl.float32)
    target = positions + tl.load(mask_token + column, mask=column < WIDTH, other=0).to(tl.float32)[None, :]
    first = tl.program_id(1).to(tl.int64) * VIEWS
    for view in range(first, tl.minimum(first + VIEWS, views)):
        place = tl.load(shown_places + view * patches + patch, mask=is_patch, other=-1)
        target_place = tl.load(target_places + view * patches + patch, mask=is_patch, other=-1)
        held = (is_class | (place >= 0))[:, None] & inside
        source = tokens + (view * (1 + shown) + 1 + place)[:, None] * WIDTH + token_column[None, :]
        token = tl.load(source, mask=held, other=0).to(tl.float32)
        row = view * (1 + shown + targets) + 1 + place
        tl.store(rows + row[:, None] * WIDTH + column[None, :], token + positions, mask=held)
        row = view * (1 + shown + targets) + 1 + shown + target_place
        tl.store(rows + row[:, None] * WIDTH + column[None, :], target, mask=(target_place >= 0)[:, None] & inside)


@jit
def _split(  # type: ignore[no-untyped-def]
    d_rows, d_tokens, sums, count, length, shown,
    WIDTH: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of SHARE rows: token rows go to `d_tokens`, the sum of the other rows goes to `sums`."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < WIDTH)[None, :]
    token_column = tl.max_contiguous(column, RUN)
    total = tl.zeros((COLUMNS,), tl.float32)
    first = tl.program_id(0) * SHARE
    for start in range(first, tl.minimum(first + SHARE, count), ROWS):
        row = start + tl.arange(0, ROWS)
        view = row // length
        place = row - view * length
        source = d_rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        gradient = tl.load(source, mask=(row < count)[:, None] & inside, other=0).to(tl.float32)
        is_token = (row < count) & (place < shown)
        token = (view.to(tl.int64) * shown + place)[:, None] * WIDTH + token_column[None, :]
        tl.store(d_tokens + token, gradient, mask=is_token[:, None] & inside)
        total += tl.sum(tl.where(is_token[:, None], 0.0, gradient), 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * WIDTH + column, total, mask=column < WIDTH)
