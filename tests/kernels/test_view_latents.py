"""Tests of `view_latents` against float64: the kernels at sizes that each have a reason, and the registered op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mimae.kernels import reference, view_latents
from mimae.kernels.runtime import launch
from mimae.kernels.view_latents import _merge, _view_latents
from tests.kernels.accuracy import DEVICE, assert_as_accurate
from tests.kernels.mutants import Mutants, mutant_tests

Op = Callable[..., tuple[Tensor, ...]]
fused: Op = partial(view_latents, impl="triton")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def independent_masks(images: int, views: int, patches: int, shown: int) -> Tensor:
    """Return masks (B, N, K): views share some patches, and no view shows some patches."""
    generator = torch.Generator().manual_seed(patches)
    ids = torch.rand(images, views, patches, generator=generator).argsort(2)[..., :shown]
    return ids.sort(2).values.to(torch.int32).to(DEVICE)


def results(op: Op, tokens: Tensor, visible: Tensor | None = None, first: int = 0) -> list[Tensor]:
    """Return z, u, the moments, and the gradient of the tokens through both z and u."""
    tokens = tokens.detach().requires_grad_()
    z, u, moments = op(tokens, visible, first)
    of_z, of_u = (drawn(*z.shape, seed).to(z)[..., 0] for seed in (1, 2))
    (z * of_z + u * of_u).sum().backward()
    assert tokens.grad is not None
    return [z.detach(), u.detach(), moments, tokens.grad]


def assert_accurate(tokens: Tensor, visible: Tensor | None = None, first: int = 0) -> None:
    arguments = visible, first
    assert_as_accurate(
        results(fused, tokens, *arguments),
        results(reference.view_latents, tokens, *arguments),
        results(reference.view_latents, tokens.double(), *arguments),
    )


PACKED = {
    "one of everything": ((1, 1, 1, 1), 0),
    "a share of 8 views and a short one, a class token, a tile of 8 tokens and one": ((5, 3, 10, 7), 1),
    "prime width over 128, 8 views": ((1, 8, 3, 131), 0),
    "more before `first` than a tile of tokens": ((2, 2, 12, 16), 9),
}


@pytest.mark.parametrize(("shape", "first"), PACKED.values(), ids=PACKED)
def test_packed_by_view(shape: tuple[int, ...], first: int) -> None:
    assert_accurate(drawn(*shape), first=first)


IN_IMAGE_ORDER = {
    "one of everything": ((1, 1, 1, 1), 0),
    "three views that share patches, two tiles of 4 tokens and one": ((3, 3, 9, 4), 0),
    "five views of a tile of 8 places and one, a prime number of patches": ((2, 5, 13, 9), 0),
    "places before `first`": ((2, 2, 6, 5), 2),
}


@pytest.mark.parametrize(("sizes", "first"), IN_IMAGE_ORDER.values(), ids=IN_IMAGE_ORDER)
def test_in_image_order(sizes: tuple[int, int, int, int], first: int) -> None:
    images, _, patches, _ = sizes
    assert_accurate(drawn(images, patches, 13), independent_masks(*sizes), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The number of tokens is one tile of 8 and one more, or below a tile."""
    assert_accurate(drawn(3, 2, 10, 24, dtype=dtype), first=1)
    assert_accurate(drawn(2, 9, 24, dtype=dtype), independent_masks(2, 3, 9, 4))


def test_autocast_changes_nothing() -> None:
    tokens = drawn(2, 2, 3, 8, dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_accurate(tokens)
        assert fused(tokens)[0].dtype == torch.float32


def test_orthogonal_masks_pool_the_tokens_of_their_packed_form() -> None:
    patches = drawn(2, 8, 5)
    visible, _ = reference.orthogonal_masks(0, 0, torch.arange(2), 8, 2, 4)
    visible = visible.to(DEVICE)
    packed = torch.stack([torch.stack([p[ids.long()] for ids in views]) for p, views in zip(patches, visible)])
    for gathered, other in zip(fused(patches, visible), fused(packed)):
        assert torch.equal(gathered, other)


def test_deviations_of_latents_far_from_zero() -> None:
    """Two programs have shares of 27 and 3. A difference of squares would lose all digits."""
    assert_accurate(1000 + 0.1 * drawn(10, 3, 1, 3))


def test_more_pairs_than_a_tile_of_them() -> None:
    """There are 13 latents in programs of 3, and tiles of 2 programs: of three tiles the last has one latent."""
    latents = (100 + drawn(13, 11)).double()
    parts = latents.split(3)
    pairs = torch.stack([torch.stack([p.mean(0), (p - p.mean(0)).square().sum(0)]) for p in parts]).float()
    moments = torch.empty(2, 11, device=DEVICE)
    launch(
        _merge, (2,), pairs=pairs, moments=moments, views=13, share=3, programs=5, D=11, ROWS=2, COLUMNS=8
    )  # fmt: skip
    centre = latents.mean(0)
    assert torch.allclose(moments[0].double(), centre, rtol=1e-6)
    assert torch.allclose(moments[1].double(), (latents - centre).square().sum(0), rtol=1e-4)


def test_short_latents_as_normalize_has_them() -> None:
    tokens = drawn(1, 3, 2, 4)
    tokens[0, 0] = 0
    tokens[0, 1] *= 1e-14
    assert_accurate(tokens)
    assert fused(tokens)[1][0, 0].abs().max() == 0


@pytest.mark.parametrize("of", [0, 1], ids=["z", "u"])
def test_gradient_of_one_output_alone(of: int) -> None:
    tokens, gradient = drawn(2, 2, 3, 5), drawn(2, 2, 5)

    def gradient_of(op: Op, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x)[of], x, gradient.to(x))[0]

    assert_as_accurate(
        gradient_of(fused, tokens),
        gradient_of(reference.view_latents, tokens),
        gradient_of(reference.view_latents, tokens.double()),
    )


def test_moments_carry_no_gradient() -> None:
    moments = fused(drawn(2, 2, 3, 5).requires_grad_())[2]
    assert not moments.requires_grad


def test_called_twice_in_one_graph() -> None:
    """Tokens are pooled as by the objective: without the class token, and only the class token."""
    tokens = drawn(2, 2, 4, 5)

    def both(op: Op, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (op(x, None, 1)[1] * op(x[:, :, :1])[0]).sum().backward()
        assert x.grad is not None
        return x.grad

    assert_as_accurate(
        both(fused, tokens.clone()),
        both(reference.view_latents, tokens.clone()),
        both(reference.view_latents, tokens.double()),
    )


def test_strided_input() -> None:
    whole = drawn(3, 4, 7, 12)
    assert_accurate(whole[:2, 1:3, 2:5, :9])
    assert_accurate(whole.transpose(2, 3))
    assert_accurate(whole[:, 0, 1:], independent_masks(3, 4, 6, 4).long()[:, ::2])


def test_same_bits_every_time() -> None:
    """Two programs have shares of 16 and 2."""
    tokens, visible = drawn(6, 6, 5), independent_masks(6, 3, 6, 3)
    once, again = results(fused, tokens, visible), results(fused, tokens, visible)
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_is_a_well_behaved_operator() -> None:
    torch.library.opcheck(_view_latents, (drawn(2, 2, 3, 4).requires_grad_(), None, 1))
    torch.library.opcheck(_view_latents, (drawn(2, 5, 4).requires_grad_(), independent_masks(2, 2, 5, 3), 0))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    tokens = drawn(2, 2, 4, 5)
    for got, want in zip(results(compiled, tokens, first=1), results(fused, tokens, first=1)):
        assert torch.equal(got, want)


MISTAKES = {
    "tokens are torch.int64": lambda x, ids: view_latents(x.long()),
    "packed by view": lambda x, ids: view_latents(x[0]),
    "in image order": lambda x, ids: view_latents(x, ids),
    "with B = 2": lambda x, ids: view_latents(x[:, 0], ids[:1]),
    "int32 or int64": lambda x, ids: view_latents(x[:, 0], ids.float()),
    "legal is 0 to 3": lambda x, ids: view_latents(x, first=4),
    "first = -1": lambda x, ids: view_latents(x, first=-1),
    "no latent": lambda x, ids: view_latents(x[:0]),
    "compute in float32": lambda x, ids: view_latents(x.double(), impl="triton"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](drawn(2, 2, 4, 3), independent_masks(2, 2, 4, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "shown"), [(768, 49), (1024, 49), (1280, 64)], ids=["B", "L", "H"])
def test_production_sizes(dtype: torch.dtype, width: int, shown: int) -> None:
    assert_accurate(drawn(512, 4, 1 + shown, width, dtype=dtype), first=1)
    assert_accurate(drawn(512, 4 * shown, width, dtype=dtype), independent_masks(512, 4, 4 * shown, shown))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    packed = torch.randn(44000, 1, 64, 768, device=DEVICE, dtype=torch.bfloat16)
    assert packed.numel() > 1 << 31
    for tokens, visible in ((packed, None), (packed[:, 0], independent_masks(44000, 2, 64, 16))):
        last = tokens[-3:].double().requires_grad_(), None if visible is None else visible[-3:]
        tokens = tokens.detach().requires_grad_()
        z, u, _ = fused(tokens, visible)
        truth = reference.view_latents(*last)
        for got, want in zip((z, u), truth):
            assert torch.allclose(got[-3:].double(), want, atol=1e-5)
        (gradient,) = torch.autograd.grad(z.sum(), tokens)
        assert torch.equal(gradient[-3:].double(), torch.autograd.grad(truth[0].sum(), last[0])[0])


@pytest.mark.gpu
def test_250_repeats_are_bit_equal() -> None:
    tokens = torch.randn(8192, 4, 50, 768, device=DEVICE, dtype=torch.bfloat16)
    once = fused(tokens, first=1)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(once, fused(tokens, first=1)))


MUTANTS = Mutants(
    "view_latents",
    __name__,
    {
        "packed": lambda patch: test_packed_by_view((5, 3, 6, 7), 1),
        "in image order": lambda patch: test_in_image_order((2, 5, 11, 7), 0),
        "far from zero": lambda patch: test_deviations_of_latents_far_from_zero(),
        "tiles of pairs": lambda patch: test_more_pairs_than_a_tile_of_them(),
    },
    [
        (
            "the last tile of tokens",
            "packed",
            "for t in range(first, T, ROWS):",
            "for t in range(first, T - ROWS, ROWS):",
        ),
        (
            "the mask of tokens",
            "in image order",
            "mask=pooled[:, None] & inside[None, :], other=0",
            "mask=inside[None, :], other=0",
        ),
        ("the stride of a view", "packed", "(number % N).to(tl.int64) * by_view", "(number % N).to(tl.int64) * 0"),
        ("how many are pooled", "packed", "latent = total / (T - first)", "latent = total / T"),
        ("ids of a view", "in image order", "visible + view * T + place", "visible + view // N * N * T + place"),
        (
            "deviations between programs",
            "far from zero",
            "squares += tl.sum(within + between, 0)",
            "squares += tl.sum(within, 0)",
        ),
        (
            "programs past the first in the moments",
            "tiles of pairs",
            "range(0, programs, ROWS)",
            "range(0, 1, ROWS)",
        ),
        ("the part of d_u along u", "packed", "(of_u - u * radial) / length", "of_u / length"),
        (
            "zeros before the first token",
            "packed",
            "tl.where((place >= first)[:, None], share[None, :], 0)",
            "share[None, :]",
        ),
        (
            "a view that shows the token too",
            "in image order",
            "tl.sum(times[:, :, None] * share[None, :, :], 1)",
            "tl.max(times[:, :, None] * share[None, :, :], 1)",
        ),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
