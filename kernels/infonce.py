"""InfoNCE's log-sum-exp and gradient, by tiles of the scores (method 3). Scores are computed, used and not stored.

Work is counted in F = 2 b B D, the product of a rank's latents of one view with all latents of another.

One product for two pairs. On one rank (b = B) the pairs (a, b) and (b, a) are the rows and the columns of the same
scores, so forward takes the N (N-1) / 2 F of a < b; local rows against all columns take N (N-1) F.

One exponential for rows and columns. Scores of unit vectors are in [-1/tau, 1/tau]. So up to 2/tau = 80, exp(s - 1/tau)
is a normal number in fp32 (the limit is 87, which leaves room for vectors that rounding made longer than 1), and no
maximum is needed. At a lower temperature rows and columns use their own maxima. tau is on the device, so the kernel
decides.

Forward. A program with a tile of rows goes through a run of columns. It writes the log-sum-exp of each of its rows and,
on one rank, of each column; a second kernel merges these parts in order. If the parts would be larger than the latents,
(N-1) B / tile > D, one rank computes in the same way as many ranks.

Gradient. A weight dS/ds depends on all D elements of two latents, and contributes to all D elements of their gradients.
These do not fit into registers: 64 rows, the minimum of a matrix instruction, fill a processor at D = 1024 (64 x 1024 x
4 = 256 KiB). With D in slices of 256, each of which recomputes the scores, the work is (1 + D/256) N (N-1) F. So the
weights of a panel of rows, which needs at most the memory of the gradient of all latents, are written in the latents'
dtype, and another kernel multiplies them with the latents. This takes 3 N (N-1) / 2 F on one rank (scores, weights
times columns, transposed weights times rows), and 2 N (N-1) F otherwise. On one rank at N = 4 and D = 768 it is 18 F,
against 48 F with slices.

These are read more than once, from the L2 cache if they fit: for the scores, latents once for each tile of the other
side; for the gradient, latents once for each tile of rows, the panel once for each tile of D, and on one rank the
gradient once for each panel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl, chosen, jit, launch, target_of, tl


def infonce_lse(rows: Tensor, columns: Tensor, offset: int, tau: Tensor, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and positives of all ordered view pairs, see `reference.infonce_lse`.

    Results are fp32, from fp32, fp16 or bf16; float64 runs in plain PyTorch. The op is not differentiable; its gradient
    is `infonce_grad`. Raises ValueError for shapes, dtypes or devices that do not fit, and for fewer than two views.
    """
    _check(rows, columns, offset, tau)
    if chosen("infonce_lse", rows, impl) == "reference":
        return reference.infonce_lse(rows, columns, offset, tau)
    return _infonce_lse(rows, columns, offset, tau)


def infonce_grad(
    rows: Tensor, columns: Tensor, offset: int, tau: Tensor, lse: Tensor, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum of lse - positive, see `reference.infonce_grad`.

    Dtypes and errors are those of `infonce_lse`. The memory in addition to the results is that of the gradient of all
    latents.
    """
    _check(rows, columns, offset, tau, lse)
    if chosen("infonce_grad", rows, impl) == "reference":
        return reference.infonce_grad(rows, columns, offset, tau, lse)
    return _infonce_grad(rows, columns, offset, tau, lse)


def _check(rows: Tensor, columns: Tensor, offset: int, tau: Tensor, lse: Tensor | None = None) -> None:
    if rows.dim() != 3 or columns.dim() != 3 or rows.shape[1:] != columns.shape[1:] or 0 in rows.shape:
        raise ValueError(f"rows are (b, N, D) and columns (B, N, D), not {tuple(rows.shape)}, {tuple(columns.shape)}")
    (b, N, _), B = rows.shape, columns.shape[0]
    if N < 2:
        raise ValueError(f"InfoNCE compares views: at least 2, not {N}")
    if not 0 <= offset <= B - b:
        raise ValueError(f"{b} rows from {offset} on are not among {B} columns")
    if tau.shape != (1,):
        raise ValueError(f"tau is (1,), not {tuple(tau.shape)}")
    if lse is not None and lse.shape != (B, N, N):
        raise ValueError(f"the lse of all rows is {(B, N, N)}, not {tuple(lse.shape)}")
    if rows.dtype != columns.dtype or not rows.is_floating_point():
        raise ValueError(f"rows and columns have one floating dtype, not {rows.dtype} and {columns.dtype}")
    for each in (columns, tau, lse):
        if each is not None and each.device != rows.device:
            raise ValueError(f"rows are on {rows.device}, another argument on {each.device}")


@torch.library.custom_op("mimae::infonce_lse", mutates_args=())
def _infonce_lse(rows: Tensor, columns: Tensor, offset: int, tau: Tensor) -> tuple[Tensor, Tensor]:
    return launch_forward(rows, columns, offset, tau)


@_infonce_lse.register_fake
def _(rows: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    b, N, _ = rows.shape
    lse, positives = (rows.new_empty(b, N, N, dtype=torch.float32) for _ in range(2))
    return lse, positives


@torch.library.custom_op("mimae::infonce_grad", mutates_args=())
def _infonce_grad(rows: Tensor, columns: Tensor, offset: int, tau: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return launch_backward(rows, columns, offset, tau, lse)


@_infonce_grad.register_fake
def _(rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=torch.float32), rows.new_empty(1, dtype=torch.float32)


# Launching


class Tiles(NamedTuple):
    """Tile of the products: rows, columns and depth of a step; and the options of the launch."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tiles(rows: Tensor, columns: Tensor) -> Tiles:
    """Return the largest tiles for which the registers suffice, because they move the fewest bytes per product.

    An fp32 product is three tf32 products, whose operands need registers, also on Hopper and Blackwell.
    """
    generation = target_of(columns).capability // 10
    if columns.dtype == torch.float32:
        return Tiles(128, 128, 32, 8, 3) if generation in (9, 10) else Tiles(64, 64, 16, 4, 4)
    if generation == 9:  # A rank among many has few rows.
        return Tiles(256 if len(rows) == len(columns) else 128, 128, 64, 8, 3)
    return Tiles(128, 128, 32, 8, 4)


def _ceil(size: int, divisor: int) -> int:
    return -(-size // divisor)


def launch_forward(rows: Tensor, columns: Tensor, offset: int, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `infonce_lse`."""
    (b, N, D), B = rows.shape, columns.shape[0]
    tiles = _tiles(rows, columns)
    blocks, column_blocks = _ceil(b, tiles.rows), _ceil(B, tiles.columns)
    shared = b == B and (N - 1) * max(blocks, column_blocks) <= D
    if shared:
        pairs, run = N * (N - 1) // 2, tiles.columns
    else:
        pairs = N * (N - 1)
        # Choose runs so long that each processor still gets several programs, to shorten the wait for the last one.
        run = _ceil(column_blocks, _ceil(8 * target_of(columns).processors, blocks * pairs)) * tiles.columns
    parts = _ceil(B, run)
    slots = max(parts, blocks) if shared else parts
    partial = columns.new_empty(N * (N - 1), slots, b, dtype=torch.float32)
    lse, positives = (columns.new_empty(b, N, N, dtype=torch.float32) for _ in range(2))
    launch(
        _partial_kernel,
        (blocks, parts, pairs),
        warps=tiles.warps,
        stages=tiles.stages,
        u=columns.contiguous(),
        tau=tau,
        partial=partial,
        positives=positives,
        offset=offset,
        b=b,
        B=B,
        run=run,
        slots=slots,
        N=N,
        D=D,
        SHARED=shared,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
    )
    launch(
        _merge_kernel,
        (_ceil(b, 64), N * N),
        partial=partial,
        lse=lse,
        positives=positives,
        b=b,
        of_rows=parts,
        of_columns=blocks,
        slots=slots,
        N=N,
        SHARED=shared,
        ROWS=64,
        PARTS=32,
    )
    return lse, positives


def launch_backward(rows: Tensor, columns: Tensor, offset: int, tau: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `infonce_grad`."""
    (b, N, D), B = rows.shape, columns.shape[0]
    tiles = _tiles(rows, columns)
    blocks, column_blocks, width_blocks = _ceil(b, tiles.rows), _ceil(B, tiles.columns), _ceil(D, tiles.columns)
    shared = b == B
    pairs = N * (N - 1) // (2 if shared else 1)
    stride = _ceil(B, max(tiles.rows, tiles.columns)) * max(tiles.rows, tiles.columns)
    affordable = 4 * B * N * D // (pairs * stride * columns.element_size() * tiles.rows)
    height = min(blocks, max(1, affordable)) * tiles.rows
    panel = columns.new_empty(pairs, height, stride)
    # Few local rows do not fill the GPU. Then their columns are split, as long as the parts are not larger than
    # `columns`.
    programs = height // tiles.rows * N * width_blocks
    splits = max(1, min(_ceil(2 * target_of(columns).processors, programs), B // b))
    run = _ceil(B, splits * tiles.depth) * tiles.depth
    gradients = columns.new_zeros(_ceil(B, run), b, N, D, dtype=torch.float32)
    d_tau = columns.new_empty(pairs * blocks * column_blocks, dtype=torch.float32)
    u, lse = columns.contiguous(), lse.to(torch.float32).contiguous()
    for start in range(0, b, height):
        here = min(height, b - start)
        launch(
            _weights_kernel,
            (_ceil(here, tiles.rows), column_blocks, pairs),
            warps=tiles.warps,
            stages=tiles.stages,
            u=u,
            tau=tau,
            lse=lse,
            panel=panel,
            d_tau=d_tau,
            first=offset + start,
            end=offset + start + here,
            earlier=start // tiles.rows,
            blocks=blocks,
            B=B,
            height=height,
            stride=stride,
            N=N,
            D=D,
            SHARED=shared,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
        )
        launch(
            _accumulate_kernel,
            ((blocks if shared else _ceil(here, tiles.rows)) * N * width_blocks, len(gradients)),
            warps=tiles.warps,
            stages=tiles.stages,
            u=u,
            tau=tau,
            panel=panel,
            gradients=gradients,
            start=start,
            here=here,
            b=b,
            B=B,
            run=run,
            height=height,
            stride=stride,
            N=N,
            D=D,
            SHARED=shared,
            ROWS=tiles.rows,
            WIDTH=tiles.columns,
            DEPTH=tiles.depth,
        )
    return gradients[0] if len(gradients) == 1 else gradients.sum(0), d_tau.sum(0, keepdim=True)


# Kernels


@jit
def _views(pair, N: tl.constexpr, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the views (a, b) of a pair, by its number: among a < b if scores are shared, else among all a != b."""
    if SHARED:
        a = pair
        b = 1
        while a >= b:
            a -= b
            b += 1
    else:
        a = pair // (N - 1)
        b = pair % (N - 1)
        b = tl.where(b < a, b, b + 1)
    return a, b


@jit
def _number(a, b, N: tl.constexpr, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the number of a pair: the inverse of `_views`."""
    return b * (b - 1) // 2 + a if SHARED else a * (N - 1) + tl.where(b < a, b, b - 1)


@jit
def _latents(u, image, view, N: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the offset of the latent of an image's view."""
    return u + (tl.cast(image, tl.int64) * N + view) * D


@jit
def _products(  # type: ignore[no-untyped-def]
    left,
    lefts,
    right,
    rights,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return the products of the latents of one view with those of another; `left` and `right` point to the first ones.

    Products from `lefts` and `rights` on are zero.
    """
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, D, DEPTH):
        in_row = (i < lefts)[:, None] & (k < D - first)[None, :]
        in_column = (j < rights)[None, :] & (k < D - first)[:, None]
        x = tl.load(left + first + i[:, None] * (N * D) + k[None, :], mask=in_row, other=0.0)
        y = tl.load(right + first + j[None, :] * (N * D) + k[:, None], mask=in_column, other=0.0)
        products = tl.dot(x, y, products, input_precision="tf32x3")
    return products


@jit
def _halves(tile):  # type: ignore[no-untyped-def]
    """Return the left and the right half of a tile, so that only half of it is in registers after a product."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@jit
def _slopes(tau):  # type: ignore[no-untyped-def]
    """Return 1/tau and log2 e / tau.

    They are rounded in the gradient as in forward, so that the common error of all scores cancels with the
    log-sum-exps, also in d_tau.
    """
    inverse = tl.div_rn(1.0, tl.load(tau).to(tl.float32))
    return inverse, 1.4426950408889634 * inverse


@jit
def _partial_kernel(  # type: ignore[no-untyped-def]
    u,
    tau,
    partial,
    positives,
    offset,
    b,
    B,
    run,
    slots,
    N: tl.constexpr,
    D: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute the log-sum-exp of each row of a tile over a run of columns, and the positives.

    With shared scores it also computes the log-sum-exp of each column over the rows of the tile.
    """
    HALF: tl.constexpr = COLUMNS // 2
    block = tl.program_id(0)
    part = tl.program_id(1)
    view, other = _views(tl.program_id(2), N, SHARED)
    inverse, slope = _slopes(tau)
    bounded = 2 * inverse <= 80
    rows = block * ROWS + tl.arange(0, ROWS)
    left = _latents(u, offset + block * ROWS, view, N, D)
    peak = tl.zeros((ROWS,), tl.float32) + tl.where(bounded, inverse, float("-inf"))
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(part * run, tl.minimum(B, (part + 1) * run), COLUMNS):
        right = _latents(u, start, other, N, D)
        tile = _products(left, b - block * ROWS, right, B - start, N, D, ROWS, COLUMNS, DEPTH)
        halves = _halves(tile)
        for half in tl.static_range(2):
            products = halves[half]
            first = start + half * HALF
            columns = first + tl.arange(0, HALF)
            if (first < offset + (block + 1) * ROWS) & (first + HALF > offset + block * ROWS):
                own = columns[None, :] == (offset + rows)[:, None]
                positive = tl.sum(tl.where(own, products, 0.0), 1) * inverse
                held = (rows < b) & (offset + rows >= first) & (offset + rows < first + HALF)
                tl.store(positives + (rows.to(tl.int64) * N + view) * N + other, positive, mask=held)
                if SHARED:
                    tl.store(positives + (rows.to(tl.int64) * N + other) * N + view, positive, mask=held)
            if bounded:
                there = (rows < b)[:, None] & (columns < B)[None, :]
                shares = tl.where(there, tl.exp2(products * slope - slope), 0.0)
                total += tl.sum(shares, 1)
                by_column = inverse + tl.log(tl.sum(shares, 0))
            else:
                scores = tl.where((columns < B)[None, :], products * inverse, float("-inf"))
                higher = tl.maximum(peak, tl.max(scores, 1))
                total = total * tl.exp(peak - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
                peak = higher
                scores = tl.where((rows < b)[:, None], products * inverse, float("-inf"))
                top = tl.max(scores, 0)
                by_column = top + tl.log(tl.sum(tl.exp(scores - top[None, :]), 0))
            if SHARED:
                slot = (_number(other, view, N, False) * slots + block).to(tl.int64) * b
                tl.store(partial + slot + columns, by_column, mask=columns < B)
    slot = (_number(view, other, N, False) * slots + part).to(tl.int64) * b
    tl.store(partial + slot + rows, peak + tl.log(total), mask=rows < b)


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    partial,
    lse,
    positives,
    b,
    of_rows,
    of_columns,
    slots,
    N: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the log-sum-exp of each row from its parts.

    Rows and columns of shared scores have different numbers of parts. The log-sum-exp and positive of a view with
    itself are zero.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    view = tl.program_id(1) // N
    other = tl.program_id(1) % N
    place = (rows.to(tl.int64) * N + view) * N + other
    if view == other:
        tl.store(lse + place, tl.zeros((ROWS,), tl.float32), mask=rows < b)
        tl.store(positives + place, tl.zeros((ROWS,), tl.float32), mask=rows < b)
    else:
        parts = of_rows
        if SHARED:
            parts = tl.where(view < other, of_rows, of_columns)
        slot = (_number(view, other, N, False) * slots).to(tl.int64)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            pointers = partial + (slot + part)[:, None] * b + rows[None, :]
            values = tl.load(pointers, mask=(part < parts)[:, None] & (rows < b)[None, :], other=float("-inf"))
            higher = tl.maximum(peak, tl.max(values, 0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(values - higher[None, :]), 0)
            peak = higher
        tl.store(lse + place, peak + tl.log(total), mask=rows < b)


@jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    u,
    tau,
    lse,
    panel,
    d_tau,
    first,
    end,
    earlier,
    blocks,
    B,
    height,
    stride,
    N: tl.constexpr,
    D: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write dS/ds of the scores of images first .. end as a panel padded with zeros, and the tile's part of d_tau.

    The weights are multiplied by 2^14, so that small ones are not lost in fp16.
    """
    HALF: tl.constexpr = COLUMNS // 2
    block = tl.program_id(0)
    column_block = tl.program_id(1)
    pair = tl.program_id(2)
    view, other = _views(pair, N, SHARED)
    inverse, slope = _slopes(tau)
    first += block * ROWS
    rows = first + tl.arange(0, ROWS)
    left = _latents(u, first, view, N, D)
    right = _latents(u, column_block * COLUMNS, other, N, D)
    tile = _products(left, end - first, right, B - column_block * COLUMNS, N, D, ROWS, COLUMNS, DEPTH)
    halves = _halves(tile)
    of_rows = tl.load(lse + (rows.to(tl.int64) * N + view) * N + other, mask=rows < end, other=0.0)
    corner = panel + (pair.to(tl.int64) * height + block * ROWS) * stride
    share = 0.0
    for half in tl.static_range(2):
        products = halves[half]
        start = column_block * COLUMNS + half * HALF
        columns = start + tl.arange(0, HALF)
        of_columns = tl.load(lse + (columns.to(tl.int64) * N + other) * N + view, mask=columns < B, other=0.0)
        if 2 * inverse <= 80:
            shares = tl.exp2(products * slope - slope + 14)
            from_rows = tl.exp2((inverse - of_rows) * 1.4426950408889634)
            from_columns = tl.exp2((inverse - of_columns) * 1.4426950408889634)
            weights = shares * (from_rows[:, None] + from_columns[None, :])
        else:
            scores = products * inverse
            weights = 16384 * (tl.exp(scores - of_rows[:, None]) + tl.exp(scores - of_columns[None, :]))
        if (start < first + ROWS) & (start + HALF > first):
            # Subtract the positive, as a row and as a column, before rounding: rounding weights near 2 would lose the
            # rest.
            weights = tl.where(rows[:, None] == columns[None, :], weights - 32768, weights)
        weights = tl.where((rows < end)[:, None] & (columns < B)[None, :], weights, 0.0)
        place = tl.arange(0, ROWS)[:, None] * stride + columns[None, :]
        tl.store(corner + place, weights.to(panel.dtype.element_ty))
        share += tl.sum(tl.sum(weights * products, 1), 0)
    # S depends on u and tau through u.u / tau, so tau dS/dtau = -sum s dS/ds.
    share *= inverse * inverse * (-1 / 16384)
    if not SHARED:
        share *= 0.5
    tl.store(d_tau + (pair * blocks + earlier + block) * tl.num_programs(1) + column_block, share)


@jit
def _add(result, tile, rows, d_start, N: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile to the first `rows` latents of the view at `result`, from dimension d_start on."""
    HALF: tl.constexpr = tile.shape[1] // 2
    i = tl.arange(0, tile.shape[0])
    halves = _halves(tile)
    for half in tl.static_range(2):
        d = d_start + half * HALF + tl.arange(0, HALF)
        place = result + i[:, None] * (N * D) + d[None, :]
        mask = (i < rows)[:, None] & (d < D)[None, :]
        tl.store(place, halves[half] + tl.load(place, mask=mask, other=0.0), mask=mask)


@jit
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    u,
    tau,
    panel,
    gradients,
    start,
    here,
    b,
    B,
    run,
    height,
    stride,
    N: tl.constexpr,
    D: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add the panel's part to the gradient of ROWS x WIDTH of a view.

    The part is the weights as rows, times the latents of their columns; on one rank also the weights as columns, times
    the latents of the panel's rows.
    """
    width_blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    number = tl.program_id(0)
    split = tl.program_id(1)
    view = number // width_blocks % N
    block = number // (width_blocks * N)
    # The panel's own rows come first, because they have the most work.
    first = tl.multiple_of((start + block * ROWS) % (tl.cdiv(b, ROWS) * ROWS), ROWS)
    begin = split * run
    rows = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    d = number % width_blocks * WIDTH + tl.arange(0, WIDTH)
    step = k[:, None] * (N * D) + d[None, :]
    result = gradients + (tl.cast(split * b + first, tl.int64) * N + view) * D
    scale = tl.div_rn(1.0, tl.load(tau).to(tl.float32)) * (1 / 16384)
    # On one rank the view's latents are columns of the pairs with lower views; otherwise they are columns of none.
    below = view if SHARED else 0
    if (block * ROWS < here) & (below < N - 1):
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for pair in range(below, N - 1):
            other = pair + 1 if SHARED else tl.where(pair < view, pair, pair + 1)
            corner = (tl.cast(_number(view, other, N, SHARED), tl.int64) * height + block * ROWS) * stride
            left = panel + corner + begin
            right = _latents(u, begin, other, N, D)
            for column in range(begin, tl.minimum(B, begin + run), DEPTH):
                x = tl.load(left + rows[:, None] * stride + k[None, :])
                y = tl.load(right + step, mask=(k < B - column)[:, None] & (d < D)[None, :], other=0.0)
                total = tl.dot(x, y, total, input_precision="tf32x3")
                left += DEPTH
                right += DEPTH * N * D
        _add(result, total * scale, b - first, number % width_blocks * WIDTH, N, D)
    if below > 0:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for other in range(0, below):
            left = panel + tl.cast(_number(other, view, N, SHARED), tl.int64) * height * stride + first
            right = _latents(u, start, other, N, D)
            for row in range(0, here, DEPTH):
                x = tl.load(left + k[:, None] * stride + rows[None, :])
                y = tl.load(right + step, mask=(k < here - row)[:, None] & (d < D)[None, :], other=0.0)
                total = tl.dot(tl.trans(x), y, total, input_precision="tf32x3")
                left += DEPTH * stride
                right += DEPTH * N * D
        # Other threads may have added the sum above.
        tl.debug_barrier()
        _add(result, total * scale, b - first, number % width_blocks * WIDTH, N, D)
