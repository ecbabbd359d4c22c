"""Tests of the fused embedding, forward and backward, against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mimae.kernels import embed_visible
from mimae.kernels.embed_visible import _embed_visible, _embed_visible_backward
from mimae.kernels.runtime import Launch, Target, watching
from tests.kernels.accuracy import DEVICE, assert_as_accurate
from tests.kernels.mutants import Mutants, mutant_tests


class Shape(NamedTuple):
    """Sizes of a case: images, views, visible, image, patch, width."""

    B: int
    N: int
    K: int
    H: int
    W: int
    P: int
    D: int


USUAL = Shape(2, 3, 2, 8, 12, 4, 7)  # The grid is not square, and the width is prime.


class Inputs(NamedTuple):
    images: Tensor
    visible: Tensor
    weight: Tensor
    bias: Tensor
    pos: Tensor
    cls: Tensor
    mean: Tensor
    std: Tensor
    d_tokens: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(each.to(dtype) if each.is_floating_point() else each for each in self))


def make(shape: Shape, dtype: torch.dtype = torch.float32, positions: torch.dtype = torch.float32) -> Inputs:
    """Make weight and bias of `dtype`, pos and cls of `positions`. Views are drawn independently, with unsorted ids."""
    B, N, K, H, W, P, D = shape
    generator = torch.Generator().manual_seed(H * W)
    patches = (H // P) * (W // P)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    inputs = Inputs(
        torch.randint(0, 256, (B, H, W, 3), generator=generator, dtype=torch.uint8),
        torch.rand(B, N, patches, generator=generator).argsort(2)[:, :, :K].int(),
        (noise(D, 3, P, P) / (3 * P * P) ** 0.5).to(dtype),
        noise(D).to(dtype),
        noise(1 + patches, D).to(positions),
        noise(D).to(positions),
        torch.tensor([0.485, 0.456, 0.406]),
        torch.tensor([0.229, 0.224, 0.225]),
        noise(B, N, 1 + K, D).to(torch.promote_types(dtype, positions)),
    )
    return Inputs(*(each.to(DEVICE) for each in inputs))


def run(inputs: Inputs, impl: Any) -> list[Tensor]:
    """Return the tokens, and the gradients of weight, bias and class token."""
    trained = [each.detach().requires_grad_() for each in (inputs.weight, inputs.bias, inputs.cls)]
    weight, bias, cls = trained
    tokens = embed_visible(
        inputs.images, inputs.visible, weight, bias, inputs.pos, cls, inputs.mean, inputs.std, impl=impl
    )
    return [tokens.detach(), *torch.autograd.grad(tokens, trained, inputs.d_tokens.to(tokens.dtype))]


def assert_accurate(inputs: Inputs) -> None:
    with torch.autocast(DEVICE.type, enabled=False):
        exact = run(inputs.to(torch.float64), "reference")
    assert_as_accurate(run(inputs, "triton"), run(inputs, "reference"), exact)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 1, 1, 1),  # one of everything: three features, of the sixteen that a product takes
        USUAL,
        Shape(1, 2, 0, 4, 4, 2, 5),  # no patch visible: only class tokens
        Shape(1, 1, 6, 4, 6, 2, 5),  # a whole image in one view
        Shape(1, 8, 1, 28, 56, 14, 17),  # eight views of one patch; ten steps of features, the last one not full
        Shape(2, 2, 3, 32, 48, 16, 12),  # 12 full steps of features; a width that is a multiple of 4, but not of 8
        Shape(1, 5, 12, 6, 8, 2, 65),  # one row and one column over a small tile
    ],
)
def test_sizes(shape: Shape) -> None:
    assert_accurate(make(shape))


@pytest.mark.parametrize(
    ("capability", "visible", "width"),
    [(90, 256, 129), *(pytest.param(each, 128, 257, marks=pytest.mark.slow) for each in (80, 100))],
)
def test_large_tiles(capability: int, visible: int, width: int) -> None:
    """There are one row and one column more than a tile of each generation; backward has one part, and one channel
    more.
    """
    launches: list[Launch] = []
    with watching(launches.append, Target(capability, processors=1)):
        assert_accurate(make(Shape(1, 1, visible, 64, 64, 4, width)))
    if DEVICE.type == "cpu":
        assert min(launch.arguments["ROWS"] for launch in launches if "ROWS" in launch.arguments) >= 128


@pytest.mark.parametrize(
    ("dtype", "positions"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_promote_as_in_plain_pytorch(dtype: torch.dtype, positions: torch.dtype) -> None:
    assert_accurate(make(USUAL, dtype, positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    with torch.autocast(DEVICE.type, dtype):
        assert_accurate(make(Shape(2, 2, 3, 32, 48, 16, 12)))


@pytest.mark.parametrize("value", [0, 128, 255])
def test_plain_images(value: int) -> None:
    """The values are the extremes of a byte, and the byte that is zero inside the product."""
    inputs = make(USUAL, torch.bfloat16)
    assert_accurate(inputs._replace(images=torch.full_like(inputs.images, value)))


def test_called_twice_in_one_graph() -> None:
    inputs, others = make(USUAL), make(Shape(1, 2, 5, 8, 12, 4, 7))
    weight = inputs.weight.detach().requires_grad_()
    both = [embed_visible(*each[:2], weight, *inputs[3:8], impl="triton") for each in (inputs, others)]
    (gradient,) = torch.autograd.grad(both, weight, [inputs.d_tokens, others.d_tokens])
    parts = [
        run(inputs._replace(images=each.images, visible=each.visible, d_tokens=each.d_tokens), "triton")[1]
        for each in (inputs, others)
    ]
    assert torch.equal(gradient, parts[0] + parts[1])


def test_strides_and_kind_of_ids_do_not_matter() -> None:
    """The images are channels-last, the ids of one view are expanded to all images, and so is the gradient."""
    inputs = make(USUAL)
    inputs = inputs._replace(
        visible=inputs.visible[:1].expand(2, -1, -1), d_tokens=torch.ones((), device=DEVICE).expand(2, 3, 3, 7)
    )
    strided = inputs._replace(
        images=inputs.images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        visible=inputs.visible.long(),
        weight=inputs.weight.transpose(0, 3).contiguous().transpose(0, 3),
        pos=inputs.pos.T.contiguous().T,
    )
    assert not strided.images.is_contiguous() and not strided.weight.is_contiguous()
    packed = Inputs(*(each.contiguous() for each in inputs))
    for ours, theirs in zip(run(strided, "triton"), run(packed, "triton"), strict=True):
        assert torch.equal(ours, theirs)


def test_equal_inputs_give_equal_bits() -> None:
    inputs = make(Shape(3, 4, 4, 16, 16, 4, 20))
    for first, again in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(first, again)


def test_frozen_weights_cost_no_backward_product() -> None:
    inputs = make(USUAL)
    cls = inputs.cls.detach().requires_grad_()
    launches: list[Launch] = []
    with watching(launches.append):
        tokens = embed_visible(*inputs[:5], cls, inputs.mean, inputs.std, impl="triton")
        forward = len(launches)
        (gradient,) = torch.autograd.grad(tokens, cls, inputs.d_tokens)
    assert forward == len(launches) == 2
    assert torch.equal(gradient, run(inputs, "triton")[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(2, 8, 12, 3)}, "images are uint8"),
        ({"images": torch.zeros(2, 8, 12, 4, dtype=torch.uint8)}, "images are uint8"),
        ({"images": torch.zeros(2, 8, 10, 3, dtype=torch.uint8)}, "8 x 10 pixels do not divide into patches of 4"),
        ({"weight": torch.zeros(7, 3, 4, 2)}, "weight is"),
        ({"visible": torch.zeros(2, 6, dtype=torch.int32)}, "goes visible"),
        ({"visible": torch.zeros(3, 3, 2, dtype=torch.int32)}, "goes visible"),
        ({"visible": torch.zeros(2, 3, 2)}, "legal is int32 or int64"),
        ({"bias": torch.zeros(8)}, "goes bias"),
        ({"pos": torch.zeros(6, 7)}, "goes pos"),
        ({"cls": torch.zeros(1, 7)}, "goes cls"),
        ({"mean": torch.zeros(1)}, "goes mean"),
        ({"std": torch.ones(3, dtype=torch.int64)}, "legal is floating point"),
        ({"bias": torch.zeros(7, device="meta")}, "legal is floating point on"),
        ({"pos": torch.zeros(7, 7, requires_grad=True)}, "positions are fixed"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Tensor], message: str) -> None:
    moved = {name: each if each.is_meta else each.to(DEVICE) for name, each in changes.items()}
    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match=message):
            embed_visible(*make(USUAL)._replace(**moved)[:8], impl=impl)  # type: ignore[arg-type]


def test_float64_is_plain_pytorchs() -> None:
    inputs = make(USUAL).to(torch.float64)
    assert torch.equal(run(inputs, "auto")[0], run(inputs, "reference")[0])
    with pytest.raises(ValueError, match="float32"):
        run(inputs, "triton")


def test_the_ops_are_registered_as_torch_wants_them() -> None:
    inputs = make(USUAL)
    trained = [each.detach().requires_grad_() for each in (inputs.weight, inputs.bias, inputs.cls)]
    arguments = (*inputs[:2], *trained[:2], inputs.pos, trained[2], *inputs[6:8], torch.bfloat16)
    torch.library.opcheck(_embed_visible, arguments)
    arguments = (inputs.d_tokens, *inputs[:2], *inputs[6:8], 4, torch.float32)
    torch.library.opcheck(_embed_visible_backward, arguments)


def test_compiles_in_one_graph() -> None:
    inputs = make(USUAL)
    weight = inputs.weight.detach().requires_grad_()

    def embed(weight: Tensor) -> Tensor:
        return embed_visible(*inputs[:2], weight, *inputs[3:8], impl="triton")

    tokens = torch.compile(embed, fullgraph=True, backend="aot_eager")(weight)
    expected = run(inputs, "triton")
    assert torch.equal(tokens, expected[0])
    assert torch.equal(torch.autograd.grad(tokens, weight, inputs.d_tokens)[0], expected[1])


BASE = Shape(32, 4, 49, 224, 224, 16, 768)
HUGE = Shape(16, 4, 64, 224, 224, 14, 1280)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [BASE, HUGE, Shape(8, 1, 196, 224, 224, 16, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_production_sizes(shape: Shape, dtype: torch.dtype) -> None:
    assert_accurate(make(shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [BASE, HUGE])
def test_repeats_are_bit_equal(shape: Shape) -> None:
    inputs = make(shape, torch.bfloat16)
    first = run(inputs, "triton")
    for _ in range(250):
        for ours, theirs in zip(run(inputs, "triton"), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_pixels_and_tokens_past_2_31() -> None:
    """There are 16384 images of 150,528 bytes and 2.5e9 numbers in tokens. Only the last images have a gradient."""
    few = make(Shape(8, 4, 49, 224, 224, 16, 768), torch.bfloat16, torch.bfloat16)
    images = torch.zeros(16384, 224, 224, 3, dtype=torch.uint8, device=DEVICE)
    visible = torch.zeros(16384, 4, 49, dtype=torch.int32, device=DEVICE)
    d_tokens = torch.zeros(16384, 4, 50, 768, dtype=torch.bfloat16, device=DEVICE)
    images[-8:], visible[-8:], d_tokens[-8:] = few.images, few.visible, few.d_tokens
    assert images.numel() > 2**31 and d_tokens.numel() > 2**31
    tokens, *gradients = run(few._replace(images=images, visible=visible, d_tokens=d_tokens), "triton")
    exact = run(few.to(torch.float64), "reference")
    assert_as_accurate([tokens[-8:], *gradients], run(few, "reference"), exact)


MUTANTS = Mutants(
    "embed_visible",
    __name__,
    {
        "usual": lambda patch: test_sizes(USUAL),
        "steps": lambda patch: test_sizes(Shape(2, 2, 3, 32, 48, 16, 12)),
    },
    [
        (
            "the first step of the product",
            "steps",
            "range(0, PIECES * PADDED, STEP)",
            "range(STEP, PIECES * PADDED, STEP)",
        ),
        (
            "the line of a pixel",
            "usual",
            "feature // (3 * PATCH) * (3 * WIDTH)",
            "feature // (3 * PATCH) * (3 * PATCH)",
        ),
        (
            "the image of a view",
            "usual",
            "origin = _origin(sequence // VIEWS, patch, PATCH, HEIGHT, WIDTH)\n\n",
            "origin = _origin(sequence * 0, patch, PATCH, HEIGHT, WIDTH)\n\n",
        ),
        ("the class token", "usual", "tl.where(is_patch[:, None], of_patch, of_class)", "of_patch"),
        ("a patch's own position", "usual", "pos + (1 + patch)[:, None]", "pos + (0 * patch)[:, None]"),
        (
            "the least piece of fp32",
            "usual",
            "tl.where(piece == 1, rest, least)",
            "tl.where(piece == 1, rest, 0.0)",
        ),
        (
            "rows without pixels in backward",
            "usual",
            "gradient = tl.where(is_patch[:, None], gradient.to(tl.float32), 0.0)",
            "gradient = gradient.to(tl.float32)",
        ),
        ("the last part of backward", "usual", "for part in range(parts):", "for part in range(parts - 1):"),
        ("the channel's mean in backward", "usual", "(total + _offset(mean, channel) * bias_total)", "total"),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
