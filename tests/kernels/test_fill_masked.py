"""Tests of the fused decoder input, forward and backward, against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mimae.bench.ops.counting import counting
from mimae.kernels import fill_masked
from mimae.kernels.fill_masked import _fill_masked, _fill_masked_backward, launch_backward, launch_forward
from mimae.kernels.places import places
from mimae.kernels.runtime import INTERPRETED
from tests.kernels.accuracy import DEVICE, assert_as_accurate
from tests.kernels.mutants import Mutants, mutant_tests


class Shape(NamedTuple):
    """Sizes of a case: images, views, patches, visible, targets, width."""

    B: int
    N: int
    L: int
    K: int
    M: int
    D: int


USUAL = Shape(2, 3, 7, 3, 4, 20)  # The sizes are odd, and the width is no power of two.


class Inputs(NamedTuple):
    tokens: Tensor
    visible: Tensor
    targets: Tensor
    mask_token: Tensor
    pos: Tensor
    d_rows: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(each.to(dtype) if each.is_floating_point() else each for each in self))


def make(shape: Shape, dtype: torch.dtype = torch.float32, others: torch.dtype = torch.float32) -> Inputs:
    """Make tokens of `dtype` and the other inputs of `others`.

    Each view is drawn by itself: a visible patch of one view may be a target of another one. If K + M > L, some patches
    of a view are both.
    """
    B, N, L, K, M, D = shape
    generator = torch.Generator().manual_seed(L)
    order = torch.rand(B, N, L, generator=generator).argsort(2).int()
    numbers = [torch.randn(*size, generator=generator) for size in ((B, N, 1 + K, D), (D,), (1 + L, D))]
    tokens, mask_token, pos = numbers
    d_rows = torch.randn(B, N, 1 + K + M, D, generator=generator)
    inputs = Inputs(
        tokens.to(dtype),
        order[:, :, :K].contiguous(),
        order[:, :, L - M :].contiguous(),
        mask_token.to(others),
        pos.to(others),
        d_rows.to(torch.promote_types(dtype, others)),
    )
    return Inputs(*(each.to(DEVICE) for each in inputs))


def run(inputs: Inputs, impl: Any) -> list[Tensor]:
    """Return the rows, and the gradients of tokens and mask token."""
    tokens, mask_token = (each.detach().requires_grad_() for each in (inputs.tokens, inputs.mask_token))
    rows = fill_masked(tokens, inputs.visible, inputs.targets, mask_token, inputs.pos, impl)
    return [rows.detach(), *torch.autograd.grad(rows, (tokens, mask_token), inputs.d_rows)]


def assert_accurate(inputs: Inputs) -> list[Tensor]:
    fused, double = run(inputs, "triton"), inputs.to(torch.float64)
    # The gradient of the mask token may have few numbers, each of which is a sum over all targets.
    terms = run(double._replace(d_rows=double.d_rows.abs()), "reference")[2]
    assert_as_accurate(fused, run(inputs, "reference"), run(double, "reference"), [None, None, terms])
    return fused


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 0, 1, 1),  # one of everything, no patch visible
        USUAL,
        Shape(2, 2, 5, 5, 0, 8),  # all visible, no target
        Shape(1, 8, 8, 1, 7, 12),  # eight views
        Shape(1, 2, 6, 3, 2, 16),  # a patch that is neither visible nor a target
        Shape(1, 2, 6, 4, 5, 16),  # patches that are both
        Shape(11, 3, 4, 2, 2, 8),  # one view over a program's share
        Shape(1, 1, 128, 40, 88, 16),  # class token and patches: one row over a tile
        Shape(1, 3, 3, 1, 2, 516),  # columns over a tile, and rows over a tile of backward
        Shape(1, 2, 255, 1, 254, 3),  # views of as many rows as a program of backward takes
        Shape(1, 1, 300, 9, 257, 4),  # ids and patches over a block of `places`
    ],
)
def test_sizes(shape: Shape) -> None:
    assert_accurate(make(shape))


@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        (torch.bfloat16, torch.float32),  # autocast's
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_promote_as_in_plain_pytorch(dtype: torch.dtype, others: torch.dtype) -> None:
    assert_accurate(make(USUAL, dtype, others))


def test_under_autocast() -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_accurate(make(USUAL, torch.bfloat16))
        assert_accurate(make(USUAL))


def test_rows_of_equal_dtype_are_those_of_plain_pytorch_bit_for_bit() -> None:
    inputs = make(USUAL)
    assert torch.equal(run(inputs, "triton")[0], run(inputs, "reference")[0])


def test_any_strides_and_ids_of_64_bits() -> None:
    """Tokens are cut out of a longer sequence, ids are transposed, positions are every second row, the gradient is
    expanded.
    """
    inputs = make(USUAL)
    B, N, L, K, M, D = USUAL
    longer = torch.randn(N, B, 2 + K, D, device=DEVICE).transpose(0, 1)
    strided = Inputs(
        longer[:, :, 1:],
        inputs.visible.long().transpose(1, 2).contiguous().transpose(1, 2),
        inputs.targets.long(),
        torch.randn(2 * D, device=DEVICE)[::2],
        torch.randn(2 + 2 * L, D, device=DEVICE)[::2],
        torch.randn(D, device=DEVICE).expand(B, N, 1 + K + M, D),
    )
    assert not any(strided[i].is_contiguous() for i in (0, 1, 3, 4, 5))
    assert_accurate(strided)


def test_twice_in_one_graph() -> None:
    """The rows of one call are the tokens of the next one, with the same mask token."""

    def gradient(inputs: Inputs, impl: Any) -> Tensor:
        mask_token = inputs.mask_token.clone().requires_grad_()
        visible, targets, pos = inputs.visible, inputs.targets, inputs.pos
        rows = fill_masked(inputs.tokens, visible, targets, mask_token, pos, impl)
        tokens = rows[:, :, : inputs.tokens.shape[2]]
        rows = fill_masked(tokens, visible, targets, mask_token, pos, impl)
        return torch.autograd.grad(rows, mask_token, inputs.d_rows)[0]

    inputs = make(USUAL)
    exact = gradient(inputs.to(torch.float64), "reference")
    assert_as_accurate(gradient(inputs, "triton"), gradient(inputs, "reference"), exact)


def test_repeats_are_bit_equal() -> None:
    inputs = make(Shape(2, 2, 30, 9, 21, 40))
    for first, second in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted in the interpreter")
def test_tokens_and_rows_move_once_and_positions_once_for_32_views() -> None:
    inputs = make(Shape(11, 3, 4, 2, 2, 8))
    with counting() as launches:
        rows = launch_forward(*inputs[:5])
        d_tokens, _ = launch_backward(rows, 3, torch.float32, torch.float32)
    *_, fill, split = launches
    moved = fill.traffic
    assert moved["tokens"].issued == d_tokens.numel() * 4
    assert moved["rows"].issued == rows.numel() * 4
    assert moved["pos"].issued == 2 * inputs.pos.numel() * 4
    assert moved["shown_places"].issued == moved["target_places"].issued == 33 * 4 * 4
    assert split.traffic["d_rows"].issued == rows.numel() * 4
    assert split.traffic["d_tokens"].issued == d_tokens.numel() * 4


def test_an_empty_batch() -> None:
    rows, d_tokens, d_mask_token = run(make(Shape(0, 3, 7, 3, 4, 20)), "triton")
    assert rows.shape == (0, 3, 8, 20) and d_tokens.shape == (0, 3, 4, 20)
    assert torch.equal(d_mask_token, torch.zeros(20, device=DEVICE))


def test_places_invert_a_list() -> None:
    ids = torch.tensor([[[4, 0, 2], [1, 2, 3]]], device=DEVICE)
    assert places(ids, 5).tolist() == [[[1, -1, 2, -1, 0], [-1, 0, 1, 2, -1]]]


def test_float64_is_left_to_plain_pytorch() -> None:
    inputs = make(USUAL).to(torch.float64)
    assert run(inputs, "auto")[0].dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        run(inputs, "triton")


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 4, 20)}, r"tokens are \(B, N, 1\+K, Dd\)"),
        ({"tokens": torch.zeros(2, 3, 0, 20)}, r"tokens are \(B, N, 1\+K, Dd\)"),
        ({"tokens": torch.zeros(2, 3, 4, 20, dtype=torch.int32)}, "legal is floating point"),
        ({"tokens": torch.zeros(2, 3, 5, 20)}, "4 visible tokens a view, but 3 ids"),
        ({"visible": torch.zeros(2, 2, 3, dtype=torch.int32)}, r"visible is \(B, N, ids\)"),
        ({"targets": torch.zeros(2, 3, 4)}, "targets is torch.float32"),
        ({"targets": torch.zeros(2, 3, 8, dtype=torch.int64)}, "targets lists 8 ids a view, of 7 patches"),
        ({"mask_token": torch.zeros(19)}, r"mask_token \(20,\)"),
        ({"mask_token": torch.zeros(20, device="meta")}, "on meta"),
        ({"pos": torch.zeros(8, 21)}, r"pos \(1\+L, 20\)"),
        ({"pos": torch.zeros(8, 20, requires_grad=True)}, "positions are fixed"),
    ],
)
def test_mistakes_are_told(change: dict[str, Tensor], message: str, impl: Any) -> None:
    arguments = make(USUAL)._asdict()
    del arguments["d_rows"]
    arguments |= {name: value if value.is_meta else value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        fill_masked(**arguments, impl=impl)


def test_the_ops_are_registered_as_torch_wants_them() -> None:
    tokens, visible, targets, mask_token, pos, d_rows = make(Shape(1, 2, 4, 2, 2, 8), torch.bfloat16)
    learned = (tokens.requires_grad_(), visible, targets, mask_token.requires_grad_(), pos)
    torch.library.opcheck(_fill_masked, learned)
    torch.library.opcheck(_fill_masked_backward, (d_rows, 3, torch.bfloat16, torch.float32))


def test_compiles_in_one_graph() -> None:
    inputs = make(USUAL)
    eager = run(inputs, "triton")
    compiled = torch.compile(fill_masked, fullgraph=True, backend="aot_eager")
    tokens, mask_token = (each.clone().requires_grad_() for each in (inputs.tokens, inputs.mask_token))
    rows = compiled(tokens, inputs.visible, inputs.targets, mask_token, inputs.pos, "triton")
    for ours, theirs in zip(
        [rows, *torch.autograd.grad(rows, (tokens, mask_token), inputs.d_rows)], eager, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 4, 196, 49, 147, 512),  # ViT-B/16
        Shape(64, 4, 196, 49, 49, 512),  # the next view's patches
        Shape(64, 4, 256, 64, 192, 512),  # ViT-H/14
        Shape(16, 2, 576, 144, 432, 768),  # 384 pixels
    ],
)
def test_production_sizes(shape: Shape, dtype: torch.dtype) -> None:
    assert_accurate(make(shape, dtype))


@pytest.mark.gpu
def test_many_repeats_are_bit_equal() -> None:
    inputs = make(Shape(64, 4, 196, 49, 147, 512), torch.bfloat16)
    first = run(inputs, "triton")
    for _ in range(250):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(inputs, "triton"), first, strict=True))


@pytest.mark.gpu
def test_rows_past_2_31_elements() -> None:
    """Two images are repeated 4,096 times: 32,768 views of 197 rows of 512. The last two are compared with a small
    batch.
    """
    pair = make(Shape(2, 4, 196, 49, 147, 512), torch.bfloat16, torch.bfloat16)
    inputs = Inputs(*(each.repeat(4096, *[1] * (each.dim() - 1)) if each.dim() > 2 else each for each in pair))
    rows, d_tokens, _ = run(inputs, "triton")
    assert rows.numel() > 2**31
    for ours, theirs in zip((rows, d_tokens), run(pair, "reference")[:2], strict=True):
        assert torch.equal(ours[-2:], theirs)


MUTANTS_OF_PLACES = Mutants(
    "places",
    __name__,
    {"lists": lambda patch: test_places_invert_a_list()},
    [
        (
            "patches that are not listed",
            "lists",
            "tl.full((BLOCK,), -1, tl.int32)",
            "tl.full((BLOCK,), 0, tl.int32)",
        ),
        ("the stride of a view's list", "lists", "ids += view * listed", "ids += view * 0"),
    ],
)

test_an_unchanged_copy_of_places_passes, test_a_mutant_of_places_fails = mutant_tests(MUTANTS_OF_PLACES)


MUTANTS = Mutants(
    "fill_masked",
    __name__,
    {
        "usual": lambda patch: test_sizes(USUAL),
        "shares": lambda patch: test_sizes(Shape(11, 3, 4, 2, 2, 8)),
    },
    [
        ("a position", "usual", "token + positions, mask=held", "token, mask=held"),
        ("the mask token", "usual", "target = positions + tl.load(", "target = positions + 0 * tl.load("),
        (
            "the stride of a view's rows",
            "usual",
            "row = view * (1 + shown + targets) + 1 + shown + target_place",
            "row = view * (1 + shown) + 1 + shown + target_place",
        ),
        (
            "views past a program's first",
            "shares",
            "tl.program_id(1).to(tl.int64) * VIEWS",
            "tl.program_id(1).to(tl.int64) * 0",
        ),
        ("which rows are tokens, for the sum", "usual", "tl.where(is_token[:, None], 0.0, gradient)", "gradient"),
        (
            "the last tile of a share's rows",
            "usual",
            "tl.minimum(first + SHARE, count), ROWS",
            "tl.minimum(first + SHARE, count) - ROWS, ROWS",
        ),
        ("the gradient of a view's first token", "usual", "(place < shown)", "(place < shown) & (place > 0)"),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
