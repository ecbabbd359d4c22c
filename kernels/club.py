"""CLUB and V's likelihood in linear time, one pass over the latents forward and one backward.

A program processes a tile of dimensions of a share of the images, view by view, so that V's outputs are read once for
an image, whatever the number of views. It keeps its sums in registers and writes them once; a second kernel adds them
in the order of the programs, so that equal inputs give equal bits.

Traffic: forward reads z, mu and log s2 once; backward reads these once and writes the three gradients once. In
addition, each program moves for each dimension the global moments and sums (8 bytes, in backward 16) and, in forward,
its own two sums, written and read (16 bytes). The size of the share keeps these below a twentieth of the rest, so both
passes are within 1.05 of the floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl, chosen, jit, launch, target_of, tl

_IMAGES = 8
_DIMENSIONS = 128
_PROGRAMS_PER_PROCESSOR = 4


def club_terms(
    z: Tensor, mu: Tensor, log_s2: Tensor, mean: Tensor, variance: Tensor, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return CLUB's and the likelihood's sums over this rank's images, see `reference.club_terms`.

    Results are fp32, from a z of fp32, fp16 or bf16; float64 runs in plain PyTorch. The op is not differentiable; its
    gradient is `club_grad`. Raises ValueError for shapes that do not fit, for no image or view, and for float64 in
    triton.
    """
    _check(z, mu, log_s2, mean, variance)
    if chosen("club_terms", z, impl) == "reference":
        return reference.club_terms(z, mu, log_s2, mean, variance)
    return _club_terms(z, mu, log_s2, mean, variance)


def club_grad(
    z: Tensor,
    mu: Tensor,
    log_s2: Tensor,
    mean: Tensor,
    variance: Tensor,
    inverse_sum: Tensor,
    mu_inverse_sum: Tensor,
    images: int,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the two sums, see `reference.club_grad`; dtypes are those of `club_terms`.

    Raises ValueError for shapes that do not fit, for no image or view, and for `images` fewer than z has.
    """
    _check(z, mu, log_s2, mean, variance, inverse_sum, mu_inverse_sum)
    if images < z.shape[0]:
        raise ValueError(f"the global batch has {images} images, this rank's part of it {z.shape[0]}")
    if chosen("club_grad", z, impl) == "reference":
        return reference.club_grad(z, mu, log_s2, mean, variance, inverse_sum, mu_inverse_sum, images)
    return _club_grad(z, mu, log_s2, mean, variance, inverse_sum, mu_inverse_sum, images)


def _check(z: Tensor, mu: Tensor, log_s2: Tensor, *of_dimensions: Tensor) -> None:
    if z.dim() != 3 or 0 in z.shape:
        raise ValueError(f"z is (B, N, D) of at least one latent, not {tuple(z.shape)}")
    B, _, D = z.shape
    for each, shape in [(mu, (B, D)), (log_s2, (B, D)), *((each, (D,)) for each in of_dimensions)]:
        if each.shape != shape:
            raise ValueError(
                f"with z {tuple(z.shape)} go mu and log s2 {(B, D)} and the rest {(D,)}, not {tuple(each.shape)}"
            )
        if not each.is_floating_point() or each.device != z.device:
            raise ValueError(f"{each.dtype} on {each.device}: legal is floating point on {z.device}")


@torch.library.custom_op("mimae::club_terms", mutates_args=())
def _club_terms(
    z: Tensor, mu: Tensor, log_s2: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(z, mu, log_s2, mean, variance)


@_club_terms.register_fake
def _(z: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    club = z.new_empty((), dtype=torch.float32)
    inverse = z.new_empty(z.shape[2], dtype=torch.float32)
    return club, torch.empty_like(club), inverse, torch.empty_like(inverse)


@torch.library.custom_op("mimae::club_grad", mutates_args=())
def _club_grad(
    z: Tensor,
    mu: Tensor,
    log_s2: Tensor,
    mean: Tensor,
    variance: Tensor,
    inverse_sum: Tensor,
    mu_inverse_sum: Tensor,
    images: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(z, mu, log_s2, mean, variance, inverse_sum, mu_inverse_sum, images)


@_club_grad.register_fake
def _(z: Tensor, mu: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_z = z.new_empty(z.shape, dtype=torch.float32)
    d_mu = d_z.new_empty(mu.shape)
    return d_z, d_mu, torch.empty_like(d_mu)


def launch_forward(
    z: Tensor, mu: Tensor, log_s2: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `club_terms` in two launches."""
    B, N, D = z.shape
    share = _share(z, column_bytes=24, image_bytes=N * z.element_size() + 2 * mu.element_size())
    groups, tiles = -(-B // share), -(-D // _DIMENSIONS)
    club = torch.empty((), dtype=torch.float32, device=z.device)
    nll, inverse, mu_inverse = torch.empty_like(club), club.new_empty(D), club.new_empty(D)
    sums, scalars = club.new_empty(groups, 2, D), club.new_empty(2, groups * tiles)
    z, mu, log_s2 = z.contiguous(), _rows(mu), _rows(log_s2)
    launch(
        _add_up,
        (tiles, groups),
        z=z,
        mu=mu,
        log_s2=log_s2,
        mean=mean.contiguous(),
        variance=variance.contiguous(),
        sums=sums,
        scalars=scalars,
        B=B,
        share=share,
        by_mu=mu.stride(0),
        by_log_s2=log_s2.stride(0),
        N=N,
        D=D,
        IMAGES=_IMAGES,
        DIMENSIONS=_DIMENSIONS,
    )
    launch(
        _merge,
        (-(-D // 8),),
        sums=sums,
        scalars=scalars,
        club=club,
        nll=nll,
        inverse=inverse,
        mu_inverse=mu_inverse,
        groups=groups,
        programs=groups * tiles,
        D=D,
        ROWS=128,
        COLUMNS=8,
    )
    return club, nll, inverse, mu_inverse


def launch_backward(
    z: Tensor,
    mu: Tensor,
    log_s2: Tensor,
    mean: Tensor,
    variance: Tensor,
    inverse_sum: Tensor,
    mu_inverse_sum: Tensor,
    images: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `club_grad` in one launch."""
    B, N, D = z.shape
    image_bytes = N * (z.element_size() + 4) + 2 * (mu.element_size() + 4)
    share = _share(z, column_bytes=16, image_bytes=image_bytes)
    d_z = torch.empty(B, N, D, dtype=torch.float32, device=z.device)
    d_mu, d_log_s2 = d_z.new_empty(B, D), d_z.new_empty(B, D)
    z, mu, log_s2 = z.contiguous(), _rows(mu), _rows(log_s2)
    launch(
        _differentiate,
        (-(-D // _DIMENSIONS), -(-B // share)),
        z=z,
        mu=mu,
        log_s2=log_s2,
        mean=mean.contiguous(),
        variance=variance.contiguous(),
        inverse_sum=inverse_sum.contiguous(),
        mu_inverse_sum=mu_inverse_sum.contiguous(),
        d_z=d_z,
        d_mu=d_mu,
        d_log_s2=d_log_s2,
        B=B,
        share=share,
        images=images,
        by_mu=mu.stride(0),
        by_log_s2=log_s2.stride(0),
        N=N,
        D=D,
        IMAGES=_IMAGES,
        DIMENSIONS=_DIMENSIONS,
    )
    return d_z, d_mu, d_log_s2


def _rows(of_images: Tensor) -> Tensor:
    """Return a tensor whose rows are contiguous. V's mu and log s2 are halves of one tensor, so rows may have gaps."""
    return of_images if of_images.stride(1) == 1 else of_images.contiguous()


def _share(z: Tensor, column_bytes: int, image_bytes: int) -> int:
    """Return the images of a program: enough programs to fill the GPU, and 20 times the bytes of a program's sums."""
    B, _, D = z.shape
    programs = _PROGRAMS_PER_PROCESSOR * target_of(z).processors
    wanted = max(-(-20 * column_bytes // image_bytes), -(-B * -(-D // _DIMENSIONS) // programs))
    return -(-wanted // _IMAGES) * _IMAGES


@jit
def _add_up(  # type: ignore[no-untyped-def]
    z, mu, log_s2, mean, variance, sums, scalars, B, share, by_mu, by_log_s2,
    N: tl.constexpr, D: tl.constexpr, IMAGES: tl.constexpr, DIMENSIONS: tl.constexpr,
):  # fmt: skip
    """Compute the sums of `club_terms` (the first two doubled) over a share of the images and a tile of dimensions."""
    tile, group = tl.program_id(0), tl.program_id(1)
    d = tile * DIMENSIONS + tl.arange(0, DIMENSIONS)
    inside = d < D
    centre, scale, spread = _standard(mean, variance, d, inside)
    club = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
    nll = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
    inverses = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
    mu_inverses = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
    for start in range(group * share, tl.minimum(group * share + share, B), IMAGES):
        image = (start + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
        held = (image < B) & inside[None, :]
        guess = tl.load(mu + image * by_mu + d[None, :], mask=held, other=0).to(tl.float32)
        log = tl.load(log_s2 + image * by_log_s2 + d[None, :], mask=held, other=0).to(tl.float32)
        inverse = tl.where(held, tl.exp(-log), 0)
        square = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
        gain = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
        for n in range(N):
            y = (tl.load(z + (image * N + n) * D + d[None, :], mask=held, other=0).to(tl.float32) - centre) * scale
            square += (guess - y) * (guess - y)
            # This is mu^2 - (mu - y)^2, without its cancellation.
            gain += y * (2 * guess - y)
        club += (N * spread + gain) * inverse
        nll += N * log + square * inverse
        inverses += inverse
        mu_inverses += guess * inverse
    row = sums + group.to(tl.int64) * 2 * D + d
    tl.store(row, tl.sum(inverses, 0), mask=inside)
    tl.store(row + D, tl.sum(mu_inverses, 0), mask=inside)
    program = group * tl.num_programs(0) + tile
    tl.store(scalars + program, tl.sum(tl.sum(club, 1), 0))
    tl.store(scalars + tl.num_programs(0) * tl.num_programs(1) + program, tl.sum(tl.sum(nll, 1), 0))


@jit
def _merge(  # type: ignore[no-untyped-def]
    sums, scalars, club, nll, inverse, mu_inverse, groups, programs,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of `_add_up` in their order: a tile of dimensions, and in the first program the scalars."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < D
    inverses = tl.zeros((ROWS, COLUMNS), tl.float32)
    mu_inverses = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, groups, ROWS):
        group = start + tl.arange(0, ROWS)
        held = (group < groups)[:, None] & inside[None, :]
        row = sums + group.to(tl.int64)[:, None] * 2 * D + d[None, :]
        inverses += tl.load(row, mask=held, other=0)
        mu_inverses += tl.load(row + D, mask=held, other=0)
    tl.store(inverse + d, tl.sum(inverses, 0), mask=inside)
    tl.store(mu_inverse + d, tl.sum(mu_inverses, 0), mask=inside)
    if tl.program_id(0) == 0:
        twice_club = tl.zeros((ROWS * COLUMNS,), tl.float32)
        twice_nll = tl.zeros((ROWS * COLUMNS,), tl.float32)
        for start in range(0, programs, ROWS * COLUMNS):
            program = start + tl.arange(0, ROWS * COLUMNS)
            twice_club += tl.load(scalars + program, mask=program < programs, other=0)
            twice_nll += tl.load(scalars + programs + program, mask=program < programs, other=0)
        tl.store(club, tl.sum(twice_club, 0) / 2)
        tl.store(nll, tl.sum(twice_nll, 0) / 2)


@jit
def _differentiate(  # type: ignore[no-untyped-def]
    z, mu, log_s2, mean, variance, inverse_sum, mu_inverse_sum, d_z, d_mu, d_log_s2, B, share, images, by_mu, by_log_s2,
    N: tl.constexpr, D: tl.constexpr, IMAGES: tl.constexpr, DIMENSIONS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `club_grad` for a share of the images and a tile of dimensions."""
    tile, group = tl.program_id(0), tl.program_id(1)
    d = tile * DIMENSIONS + tl.arange(0, DIMENSIONS)
    inside = d < D
    centre, scale, _ = _standard(mean, variance, d, inside)
    pull = tl.load(inverse_sum + d, mask=inside, other=0).to(tl.float32) / images
    push = tl.load(mu_inverse_sum + d, mask=inside, other=0).to(tl.float32) / images
    for start in range(group * share, tl.minimum(group * share + share, B), IMAGES):
        image = (start + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
        held = (image < B) & inside[None, :]
        guess = tl.load(mu + image * by_mu + d[None, :], mask=held, other=0).to(tl.float32)
        inverse = tl.exp(-tl.load(log_s2 + image * by_log_s2 + d[None, :], mask=held, other=0).to(tl.float32))
        errors = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
        squares = tl.zeros((IMAGES, DIMENSIONS), tl.float32)
        for n in range(N):
            at = (image * N + n) * D + d[None, :]
            y = (tl.load(z + at, mask=held, other=0).to(tl.float32) - centre) * scale
            error = guess - y
            # The first part, error / s2, pulls y towards mu; the second is the gradient through the moments of y.
            tl.store(d_z + at, (error * inverse + (pull * y - push)) * scale, mask=held)
            errors += error
            squares += error * error
        tl.store(d_mu + image * D + d[None, :], errors * inverse, mask=held)
        tl.store(d_log_s2 + image * D + d[None, :], (N - squares * inverse) / 2, mask=held)


@jit
def _standard(mean, variance, d, inside):  # type: ignore[no-untyped-def]
    """Return mean, 1 / deviation and variance after standardising for a tile of dimensions, as rows.

    The variance uses the rounded scale: CLUB is a small difference of large sums, whose errors must cancel.
    """
    centre = tl.load(mean + d, mask=inside, other=0).to(tl.float32)
    before = tl.load(variance + d, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(before + 1e-6)
    return centre[None, :], scale[None, :], (before * scale * scale)[None, :]
