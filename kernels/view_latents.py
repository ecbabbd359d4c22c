"""The latent of every view, its direction, and the moments of all latents, in one pass over the tokens.

A program processes the views of its share one after the other: it pools the tokens of a view, normalises the latent,
and keeps the moments in registers (Welford), where they cause no traffic. It writes one pair (mean, sum of squared
deviations); a second kernel merges the pairs in the order of the programs (Chan), so that equal inputs give equal bits.

Traffic: forward moves each pooled token and each id once, z and u once, and 16 D bytes in each program for its pair,
written and read. The size of the share keeps these below a twentieth of the rest, so forward is within 1.05 of the
floor. Backward moves z and the two gradients once, and the tokens' whole gradient once, zeros included: the floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl, chosen, jit, launch, target_of, tl

_PROGRAMS_PER_PROCESSOR = 6
_ROWS = 8


def view_latents(
    tokens: Tensor, visible: Tensor | None = None, first: int = 0, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one latent for each view, its direction, and the local moments of CLUB's standardisation (methods 1, 3).

    tokens: packed by view (B, N, T, D), of which those from place `first` on are pooled (1 leaves out the class token);
    or in image order (B, L, D) with visible (B, N, K), int32 or int64 ids in [0, L), whose tokens are gathered first.
    -> z (B, N, D), the mean over a view's tokens, u = z / |z|, and moments (2, D): mean and sum of squared deviations
    of z over the B N latents, without gradient. Results are fp32, from tokens of fp32, fp16 or bf16 with any strides;
    float64 runs in plain PyTorch. Raises ValueError for other shapes and dtypes, if there are no tokens to pool, and
    for float64 in triton.
    """
    _check(tokens, visible, first)
    if chosen("view_latents", tokens, impl) == "reference":
        return reference.view_latents(tokens, visible, first)
    return _view_latents(tokens, visible, first)


def _check(tokens: Tensor, visible: Tensor | None, first: int) -> None:
    if not tokens.is_floating_point():
        raise ValueError(f"tokens are {tokens.dtype}: they have to be floating point")
    if visible is None:
        if tokens.dim() != 4:
            raise ValueError(f"tokens packed by view are (B, N, T, D), not {tuple(tokens.shape)}")
        pooled = tokens.shape[:3]
    else:
        if tokens.dim() != 3:
            raise ValueError(f"tokens in image order are (B, L, D), not {tuple(tokens.shape)}")
        if visible.dim() != 3 or visible.shape[0] != tokens.shape[0]:
            raise ValueError(f"visible is (B, N, K) with B = {tokens.shape[0]}, not {tuple(visible.shape)}")
        if visible.dtype not in (torch.int32, torch.int64) or visible.device != tokens.device:
            raise ValueError(
                f"visible is {visible.dtype} on {visible.device}: legal is int32 or int64 on {tokens.device}"
            )
        pooled = visible.shape
    if 0 in (*pooled, tokens.shape[-1]):
        raise ValueError(f"no latent in (B, N, T, D) = {(*pooled, tokens.shape[-1])}")
    if not 0 <= first < pooled[2]:
        raise ValueError(f"first = {first}: with {pooled[2]} tokens a view legal is 0 to {pooled[2] - 1}")


@torch.library.custom_op("mimae::view_latents", mutates_args=())
def _view_latents(tokens: Tensor, visible: Tensor | None, first: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(tokens, visible, first)


@_view_latents.register_fake
def _(tokens: Tensor, visible: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, N = (tokens if visible is None else visible).shape[:2]
    z = tokens.new_empty(B, N, tokens.shape[-1], dtype=torch.float32)
    return z, torch.empty_like(z), z.new_empty(2, z.shape[-1])


@torch.library.custom_op("mimae::view_latents_backward", mutates_args=())
def _view_latents_backward(
    z: Tensor,
    d_z: Tensor | None,
    d_u: Tensor | None,
    visible: Tensor | None,
    first: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    return launch_backward(z, d_z, d_u, visible, first, length, dtype)


@_view_latents_backward.register_fake
def _(z: Tensor, *others: Any) -> Tensor:
    *_, visible, _, length, dtype = others
    return z.new_empty(_shape_of_tokens(z, visible, length), dtype=dtype)


def _shape_of_tokens(z: Tensor, visible: Tensor | None, length: int) -> tuple[int, ...]:
    B, N, D = z.shape
    return (B, N, length, D) if visible is None else (B, length, D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, visible, ctx.first = inputs
    z, _, moments = output
    ctx.length, ctx.dtype = tokens.shape[-2], tokens.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(moments)
    ctx.save_for_backward(z, visible)


def _backward(ctx: Any, d_z: Tensor | None, d_u: Tensor | None, d_moments: None) -> tuple[Tensor | None, None, None]:
    z, visible = ctx.saved_tensors
    if d_z is None and d_u is None:
        return None, None, None
    return _view_latents_backward(z, d_z, d_u, visible, ctx.first, ctx.length, ctx.dtype), None, None


_view_latents.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(tokens: Tensor, visible: Tensor | None, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run `view_latents` in two launches."""
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    B, D = tokens.shape[0], tokens.shape[-1]
    if visible is None:
        _, N, T, _ = tokens.shape
        by_image, by_view, by_token, _ = tokens.stride()
    else:
        visible = visible.contiguous()
        _, N, T = visible.shape
        by_image, by_view, by_token = tokens.stride(0), 0, tokens.stride(1)
    views, width = B * N, tokens.element_size()
    # Enough programs to fill the GPU, and 20 times the bytes of a program's pair, counted for one dimension.
    programs = _PROGRAMS_PER_PROCESSOR * target_of(tokens).processors
    share = max(-(-views // programs), -(-20 * 16 // ((T - first) * width + 8)))
    programs = -(-views // share)
    z = torch.empty(B, N, D, dtype=torch.float32, device=tokens.device)
    u, moments, pairs = torch.empty_like(z), z.new_empty(2, D), z.new_empty(programs, 2, D)
    columns = _power_of_2(D)
    launch(
        _pool,
        (programs,),
        warps=_warps(columns * width),
        tokens=tokens,
        visible=visible,
        z=z,
        u=u,
        pairs=pairs,
        views=views,
        share=share,
        first=first,
        by_image=by_image,
        by_view=by_view,
        by_token=by_token,
        N=N,
        T=T,
        D=D,
        ROWS=min(_ROWS, _power_of_2(T - first)),
        COLUMNS=columns,
    )
    launch(
        _merge,
        (-(-D // 8),),
        pairs=pairs,
        moments=moments,
        views=views,
        share=share,
        programs=programs,
        D=D,
        ROWS=min(256, _power_of_2(programs)),
        COLUMNS=8,
    )
    return z, u, moments


def launch_backward(
    z: Tensor,
    d_z: Tensor | None,
    d_u: Tensor | None,
    visible: Tensor | None,
    first: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of tokens (B, N, T, D) or (B, L, D), `length` T or L, from those of z and u if given.

    It takes one launch.
    """
    B, N, D = z.shape
    d_tokens = torch.empty(_shape_of_tokens(z, visible, length), dtype=dtype, device=z.device)
    d_z, d_u, visible = (each if each is None else each.contiguous() for each in (d_z, d_u, visible))
    columns = _power_of_2(D)
    if visible is None:
        launch(
            _spread,
            (B * N,),
            warps=_warps(columns * d_tokens.element_size()),
            z=z,
            d_z=d_z,
            d_u=d_u,
            d_tokens=d_tokens,
            first=first,
            T=length,
            D=D,
            ROWS=min(_ROWS, _power_of_2(length)),
            COLUMNS=columns,
        )
        return d_tokens
    rows = _power_of_2(N)
    launch(
        _collect,
        (B,),
        warps=_warps(rows * columns),
        z=z,
        d_z=d_z,
        d_u=d_u,
        visible=visible,
        d_tokens=d_tokens,
        first=first,
        L=length,
        N=N,
        K=visible.shape[2],
        D=D,
        TOKENS=min(4, _power_of_2(length)),
        VIEWS=rows,
        PLACES=_power_of_2(visible.shape[2]),
        COLUMNS=columns,
    )
    return d_tokens


def _power_of_2(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _warps(row_bytes: int) -> int:
    """Return a number of threads: the pieces of 16 bytes in a row of a tile. Each thread sums its own columns."""
    return min(16, max(4, row_bytes // 512))


@jit
def _pool(  # type: ignore[no-untyped-def]
    tokens, visible, z, u, pairs, views, share, first, by_image, by_view, by_token,
    N, T, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute z and u of a share of the views, and the mean and sum of squared deviations of z."""
    start = tl.program_id(0) * share
    d = tl.arange(0, COLUMNS)
    inside = d < D
    mean = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for i in range(tl.minimum(share, views - start)):
        number = start + i
        rows = tokens + (number // N).to(tl.int64) * by_image + (number % N).to(tl.int64) * by_view
        view = number.to(tl.int64)
        total = tl.zeros((COLUMNS,), tl.float32)
        for t in range(first, T, ROWS):
            place = t + tl.arange(0, ROWS)
            pooled = place < T
            if visible is not None:
                place = tl.load(visible + view * T + place, mask=pooled, other=0)
            source = rows + place.to(tl.int64)[:, None] * by_token + d[None, :]
            tile = tl.load(source, mask=pooled[:, None] & inside[None, :], other=0)
            total += tl.sum(tile.to(tl.float32), 0)
        latent = total / (T - first)
        length = tl.maximum(tl.sqrt(tl.sum(latent * latent, 0)), 1e-12)
        tl.store(z + view * D + d, latent, mask=inside)
        tl.store(u + view * D + d, latent / length, mask=inside)
        deviation = latent - mean
        mean += deviation / (i + 1)
        squares += deviation * (latent - mean)
    pair = pairs + tl.program_id(0).to(tl.int64) * 2 * D + d
    tl.store(pair, mean, mask=inside)
    tl.store(pair + D, squares, mask=inside)


@jit
def _merge(  # type: ignore[no-untyped-def]
    pairs, moments, views, share, programs, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Merge the pairs of all programs in order: by Chan's formula over tiles of pairs, and over the tiles."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < D
    mean = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    seen = 0.0
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        held = (program < programs)[:, None] & inside[None, :]
        pair = pairs + program.to(tl.int64)[:, None] * 2 * D + d[None, :]
        means = tl.load(pair, mask=held, other=0)
        within = tl.load(pair + D, mask=held, other=0)
        # The last program's share may be short; past its end the count is zero.
        count = tl.maximum(tl.minimum(share, views - program * share), 0).to(tl.float32)
        added = tl.sum(count, 0)
        centre = tl.sum(means * count[:, None], 0) / added
        between = (means - centre[None, :]) * (means - centre[None, :]) * count[:, None]
        deviation = centre - mean
        squares += tl.sum(within + between, 0) + deviation * deviation * (seen * added / (seen + added))
        mean += deviation * (added / (seen + added))
        seen += added
    tl.store(moments + d, mean, mask=inside)
    tl.store(moments + D + d, squares, mask=inside)


@jit
def _through_latent(z, d_z, d_u, at, held, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the gradient of z: its own and that through u = z / |z|. Rows are latents along `axis`."""
    gradient = tl.zeros(at.shape, tl.float32)
    if d_z is not None:
        gradient += tl.load(d_z + at, mask=held, other=0)
    if d_u is not None:
        latent = tl.load(z + at, mask=held, other=0)
        of_u = tl.load(d_u + at, mask=held, other=0)
        norm = tl.sqrt(tl.sum(latent * latent, axis, keep_dims=True))
        length = tl.maximum(norm, 1e-12)
        u = latent / length
        # A latent shorter than the constant is divided by the constant.
        radial = tl.where(norm >= 1e-12, tl.sum(u * of_u, axis, keep_dims=True), 0)
        gradient += (of_u - u * radial) / length
    return gradient


@jit
def _spread(  # type: ignore[no-untyped-def]
    z, d_z, d_u, d_tokens, first, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the gradients of one view's tokens, packed by view, and zeros before `first`."""
    view = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = d < D
    share = _through_latent(z, d_z, d_u, view * D + d, inside, 0) / (T - first)
    for t in range(0, T, ROWS):
        place = t + tl.arange(0, ROWS)
        tile = tl.where((place >= first)[:, None], share[None, :], 0)
        target = d_tokens + (view * T + place)[:, None] * D + d[None, :]
        tl.store(target, tile.to(d_tokens.dtype.element_ty), mask=(place < T)[:, None] & inside[None, :])


@jit
def _collect(  # type: ignore[no-untyped-def]
    z, d_z, d_u, visible, d_tokens, first,
    L: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, VIEWS: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of an image's tokens in image order, each the sum over the views that show it."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, VIEWS)
    k = tl.arange(0, PLACES)
    d = tl.arange(0, COLUMNS)
    inside = d < D
    at = (image * N + n)[:, None] * D + d[None, :]
    share = _through_latent(z, d_z, d_u, at, (n < N)[:, None] & inside[None, :], 1) / (K - first)
    pooled = (n < N)[:, None] & (k >= first)[None, :] & (k < K)[None, :]
    ids = tl.load(visible + (image * N + n)[:, None] * K + k[None, :], mask=pooled, other=-1)
    for t in range(0, L, TOKENS):
        token = t + tl.arange(0, TOKENS)
        times = tl.sum((ids[None, :, :] == token[:, None, None]).to(tl.float32), 2)
        tile = tl.sum(times[:, :, None] * share[None, :, :], 1)
        target = d_tokens + (image * L + token)[:, None] * D + d[None, :]
        tl.store(target, tile.to(d_tokens.dtype.element_ty), mask=(token < L)[:, None] & inside[None, :])
