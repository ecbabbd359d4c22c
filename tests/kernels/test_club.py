"""Tests of `club_terms` and `club_grad` against float64 and against the pairwise definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mimae import kernels
from mimae.kernels import club_grad, club_terms, reference
from mimae.kernels.club import _club_grad, _club_terms, _merge
from mimae.kernels.runtime import Impl, launch
from mimae.objective.club import CLUB
from tests.kernels.accuracy import DEVICE, assert_as_accurate
from tests.kernels.mutants import Mutants, mutant_tests
from tests.oracles import club_oracle

Op = Callable[..., tuple[Tensor, ...]]
fused_terms: Op = partial(club_terms, impl="triton")
fused_grad: Op = partial(club_grad, impl="triton")
plain_grad: Op = reference.club_grad


def drawn(images: int, views: int, width: int, spread: float = 0.5) -> list[Tensor]:
    """Return z, mu and log s2, mean and variance.

    The latents are far from zero with unequal spreads, the posterior differs between images, and the global moments
    are close to those of this rank, but not equal.
    """
    generator = torch.Generator().manual_seed(images + views + width)
    z = torch.randn(images, views, width, generator=generator) * torch.linspace(0.1, 2, width) + 3
    mu = torch.randn(images, width, generator=generator)
    log_s2 = spread * (2 * torch.rand(images, width, generator=generator) - 1)
    mean = 3 + 0.1 * torch.randn(width, generator=generator)
    variance = 0.01 + torch.rand(width, generator=generator)
    return [each.to(DEVICE) for each in (z, mu, log_s2, mean, variance)]


def results(terms: Op, grad: Op, inputs: list[Tensor]) -> list[Tensor]:
    """Return the results of both ops; the second gets sums that include another rank's."""
    of_terms = terms(*inputs)
    sums = [1.5 * each for each in of_terms[2:]]
    return [*of_terms, *grad(*inputs, *sums, images=2 * inputs[0].shape[0])]


def magnitudes(inputs: list[Tensor]) -> list[Tensor]:
    """Return the sums of the absolute values of the summands in each of `results`, which do not cancel."""
    z, mu, log_s2, mean, variance = (each.double() for each in inputs)
    images, views, _ = z.shape
    scale, inverse = (variance + 1e-6).rsqrt(), (-log_s2).exp()
    y = (z - mean) * scale
    error, parts = (y - mu[:, None]).abs(), y.abs() + mu.abs()[:, None]
    square = (error * parts).sum(1) * inverse  # an error of y or mu shows times 2 (y - mu)
    club = (views * (mu.square() + variance * scale.square()) * inverse + square).sum() / 2
    nll = (views * log_s2.abs().sum() + square.sum()) / 2
    sums = [inverse.sum(0), (mu.abs() * inverse).sum(0)]
    pull, push = (each / images for each in sums)
    d_z = (parts * (pull + inverse)[:, None] + (pull * mu.abs() + push)[:, None]) * scale
    return [club, nll, *sums, d_z, parts.sum(1) * inverse, (views + square) / 2]


def assert_accurate(inputs: list[Tensor]) -> None:
    assert_as_accurate(
        results(fused_terms, fused_grad, inputs),
        results(reference.club_terms, plain_grad, inputs),
        results(reference.club_terms, plain_grad, [each.double() for each in inputs]),
        magnitudes(inputs),
    )


SIZES = {
    "one of everything": (1, 1, 1),
    "one image, 8 views": (1, 8, 5),
    "odd: a program's share of 24 images and one tile of 8 and one; prime, over a tile of 128": (33, 3, 131),
    "one view: a share of 40 images and one": (41, 1, 6),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_against_float64(sizes: tuple[int, int, int]) -> None:
    assert_accurate(drawn(*sizes))


def test_log_variances_over_their_whole_range() -> None:
    inputs = drawn(5, 2, 6)
    inputs[2] = torch.tensor([-3.0, 3.0], device=DEVICE).repeat(15).view(5, 6)
    assert_accurate(inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_posterior_of_half_precision(dtype: torch.dtype) -> None:
    """Autocast gives V's outputs in half precision. The results are still fp32, also for latents of half precision."""
    z, mu, log_s2, *moments = drawn(9, 2, 8)
    assert_accurate([z, mu.to(dtype), log_s2.to(dtype), *moments])
    assert_accurate([z.to(dtype), mu.to(dtype), log_s2.to(dtype), *moments])


def test_latents_that_carry_nothing() -> None:
    """A dimension has no variance, so its scale is that of the epsilon."""
    inputs = drawn(4, 2, 3)
    inputs[0][..., 1] = inputs[3][1]
    inputs[4][1] = 0
    assert_accurate(inputs)


def test_is_the_pairwise_definition_with_its_gradients() -> None:
    """The objective's own function is used, also with moments from the fused kernel."""
    z, mu, log_s2, *_ = drawn(7, 2, 5, spread=1.0)
    exact = [each.double().cpu().requires_grad_() for each in (z, mu, log_s2)]
    y = club_oracle.standardised(exact[0], 1e-6)
    club = club_oracle.club(y, exact[1].detach(), exact[2].detach())
    nll = club_oracle.l_fit(y, exact[1], exact[2])
    wanted = [each.detach() for each in (club, nll, *torch.autograd.grad(club + nll, exact))]

    def found(impl: Impl) -> list[Tensor]:
        ours = [each.detach().requires_grad_() for each in (z, mu, log_s2)]
        with kernels.prefer(impl):
            terms = CLUB.apply(*ours, kernels.view_latents(ours[0][:, :, None])[2])
            return [*(each.detach() for each in terms), *torch.autograd.grad(terms[0] + terms[1], ours)]

    flat = z.double().flatten(0, 1)
    of_club, of_nll, _, _, d_z, *others = magnitudes([z, mu, log_s2, flat.mean(0), flat.var(0, correction=0)])
    scales = [of_club / 14, of_nll / 70, d_z / 14, *(each / 70 for each in others)]
    assert_as_accurate(found("triton"), found("reference"), wanted, scales)


def test_halves_of_one_tensor() -> None:
    """mu and log s2 are halves of one tensor: strided rows, as from V, and also columns."""
    inputs = drawn(5, 2, 6)
    inputs[1], inputs[2] = torch.cat(inputs[1:3], 1).chunk(2, 1)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(each.is_contiguous() for each in inputs[:3])
    assert_accurate(inputs)
    inputs[1], inputs[2] = (each.T.contiguous().T for each in inputs[1:3])
    assert_accurate(inputs)


def test_more_programs_than_a_tile_of_them() -> None:
    """There are 9 groups in tiles of 4, 45 programs in tiles of 32 and 11 dimensions in tiles of 8: last tiles are
    short.
    """
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(9, 2, 11, generator=generator).to(DEVICE)
    scalars = torch.randn(2, 45, generator=generator).to(DEVICE)
    shapes = {"club": (), "nll": (), "inverse": (11,), "mu_inverse": (11,)}
    outputs: dict[str, Any] = {name: torch.empty(shape, device=DEVICE) for name, shape in shapes.items()}
    launch(_merge, (2,), sums=sums, scalars=scalars, **outputs, groups=9, programs=45, D=11, ROWS=4, COLUMNS=8)

    def merged(scalars: Tensor, sums: Tensor) -> list[Tensor]:
        return [*(scalars.sum(1) / 2), *sums.sum(0)]

    exact, terms = merged(scalars.double(), sums.double()), merged(scalars.double().abs(), sums.double().abs())
    assert_as_accurate(list(outputs.values()), merged(scalars, sums), exact, terms)


def test_same_bits_every_time() -> None:
    inputs = drawn(30, 4, 5)
    once, again = (results(fused_terms, fused_grad, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_no_gradient_is_silently_missing() -> None:
    z, mu, *others = drawn(2, 2, 3)
    club, *_ = fused_terms(z, mu.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        club.backward()


def test_are_well_behaved_operators() -> None:
    inputs = drawn(3, 2, 4)
    torch.library.opcheck(_club_terms, tuple(inputs))
    torch.library.opcheck(_club_grad, (*inputs, *inputs[3:], 5))


def test_compile_into_one_graph() -> None:
    """The ops are called twice in one graph, as with two micro-batches."""

    def both(*inputs: Tensor) -> list[Tensor]:
        return results(fused_terms, fused_grad, list(inputs)) + results(fused_terms, fused_grad, list(inputs))

    inputs = drawn(3, 2, 4)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(got, want) for got, want in zip(compiled(*inputs), both(*inputs)))


MISTAKES: dict[str, Callable[..., object]] = {
    "not \\(2, 3\\)": lambda z, mu, log_s2, m, v: club_terms(z[0], mu, log_s2, m, v),
    "of at least one latent": lambda z, mu, log_s2, m, v: club_terms(z[:, :0], mu, log_s2, m, v),
    "not \\(1, 3\\)": lambda z, mu, log_s2, m, v: club_terms(z, mu[:1], log_s2, m, v),
    "not \\(3, 2\\)": lambda z, mu, log_s2, m, v: club_terms(z, mu, log_s2.T, m, v),
    "not \\(2,\\)": lambda z, mu, log_s2, m, v: club_terms(z, mu, log_s2, m[:2], v),
    "torch.int64": lambda z, mu, log_s2, m, v: club_terms(z, mu, log_s2, m, v.long()),
    "images, this rank's part": lambda z, mu, log_s2, m, v: club_grad(z, mu, log_s2, m, v, m, v, 1),
    "not \\(1,\\)": lambda z, mu, log_s2, m, v: club_grad(z, mu, log_s2, m, v, m[:1], v, 2),
    "compute in float32": lambda z, *others: fused_terms(z.double(), *others),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](*drawn(2, 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4096, 1, 768), (4096, 4, 1024), (8192, 4, 1280)], ids=["B", "L", "H"])
def test_production_sizes(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    z, mu, log_s2, *moments = drawn(*sizes)
    assert_accurate([z, mu.to(dtype), log_s2.to(dtype), *moments])


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    z = torch.randn(66000, 4, 8192, device=DEVICE, dtype=torch.bfloat16)
    assert z.numel() > 1 << 31
    _, mu, log_s2, *moments = drawn(1, 1, 8192)
    mu, log_s2 = mu.expand(66000, -1), log_s2.expand(66000, -1)
    terms = fused_terms(z, mu, log_s2, *moments)
    d_z, d_mu, _ = fused_grad(z, mu, log_s2, *moments, *terms[2:], images=66000)
    sums = [each.double() for each in terms[2:]]
    last = [each[-3:].double() for each in (z, mu, log_s2)]
    wanted = plain_grad(*last, *(each.double() for each in moments), *sums, 66000)
    assert_as_accurate(
        [d_z[-3:], d_mu[-3:]], [each.float() for each in wanted[:2]], [each.cpu() for each in wanted[:2]]
    )


@pytest.mark.gpu
def test_250_repeats_are_bit_equal() -> None:
    inputs = drawn(8192, 4, 768)
    once = results(fused_terms, fused_grad, inputs)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(once, results(fused_terms, fused_grad, inputs)))


MUTANTS = Mutants(
    "club",
    __name__,
    {
        "sizes": lambda patch: test_against_float64((33, 3, 131)),
        "eight views": lambda patch: test_against_float64((1, 8, 5)),
        "nothing": lambda patch: test_latents_that_carry_nothing(),
    },
    [
        ("the mask of 1/s2", "eight views", "tl.where(held, tl.exp(-log), 0)", "tl.exp(-log)"),
        (
            "the last images of a share",
            "sizes",
            'IMAGES: tl.constexpr, DIMENSIONS: tl.constexpr,\n):  # fmt: skip\n    """Compute the sums',
            'IMAGES: tl.constexpr, DIMENSIONS: tl.constexpr,\n):  # fmt: skip\n    B -= 1\n    """Compute the sums',
        ),
        ("the spread of y", "nothing", "club += (N * spread + gain) * inverse", "club += (N + gain) * inverse"),
        (
            "the number of views",
            "eight views",
            "nll += N * log + square * inverse",
            "nll += log + square * inverse",
        ),
        (
            "programs past the first",
            "sizes",
            "for start in range(0, groups, ROWS):",
            "for start in range(0, 0 * groups, ROWS):",
        ),
        ("the pull through the variance", "sizes", "(pull * y - push)", "(0 * pull * y - push)"),
        ("the pull through the mean", "sizes", "(pull * y - push)", "(pull * y)"),
        ("the last view", "eight views", "            errors += error\n", "            errors = error\n"),
        (
            "the stride of views",
            "sizes",
            "at = (image * N + n) * D + d[None, :]",
            "at = (image * N + 0 * n) * D + d[None, :]",
        ),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
