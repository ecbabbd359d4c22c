"""Tests of the fused reconstruction loss and its gradient against plain PyTorch in float64."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mimae.bench.ops.counting import counting
from mimae.kernels import pixel_loss
from mimae.kernels.pixel_loss import _pixel_loss, launch_backward, launch_forward
from mimae.kernels.runtime import INTERPRETED, Launch, watching
from tests.kernels.accuracy import DEVICE, assert_as_accurate
from tests.kernels.mutants import Mutants, mutant_tests


class Shape(NamedTuple):
    """Sizes of a case: images, views, rows and columns of patches, targets, patch size."""

    B: int
    N: int
    rows: int
    columns: int
    M: int
    P: int


USUAL = Shape(2, 3, 2, 3, 4, 4)  # The grid is not square, and every view leaves patches out.


class Inputs(NamedTuple):
    predictions: Tensor
    images: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> Inputs:
    """Make inputs. Each view's targets are drawn by themselves, so views share some. One patch has a single colour."""
    B, N, rows, columns, M, P = shape
    generator = torch.Generator().manual_seed(M)
    images = torch.randint(256, (B, rows * P, columns * P, 3), dtype=torch.uint8, generator=generator)
    images[:1, :P, :P] = 77
    inputs = Inputs(
        torch.randn(B, N, M, 3 * P * P, generator=generator).to(dtype),
        images,
        torch.rand(B, N, rows * columns, generator=generator).argsort(2)[:, :, :M].int().contiguous(),
        torch.tensor((0.485, 0.456, 0.406)),
        torch.tensor((0.229, 0.224, 0.225)),
    )
    return Inputs(*(each.to(DEVICE) for each in inputs))


def run(inputs: Inputs, impl: Any, normalize: bool = True, scale: float = 1.0, weight: float = 1.0) -> list[Tensor]:
    """Return the loss, and the gradient of `weight` times the loss."""
    predictions = inputs.predictions.detach().requires_grad_()
    loss = pixel_loss(predictions, *inputs[1:], normalize, scale, impl)
    return [loss.detach(), *torch.autograd.grad(loss, predictions, torch.full_like(loss, weight))]


def assert_accurate(inputs: Inputs, **settings: Any) -> None:
    exact = run(inputs._replace(predictions=inputs.predictions.double()), "reference", **settings)
    assert_as_accurate(run(inputs, "triton", **settings), run(inputs, "reference", **settings), exact)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 1, 1),  # one pixel
        USUAL,
        Shape(1, 2, 3, 3, 9, 1),  # one patch over a program's share, all of them targets
        Shape(2, 1, 5, 7, 3, 2),  # most patches are no target
        Shape(1, 8, 2, 2, 3, 3),  # eight views, an odd patch
        Shape(1, 2, 1, 3, 2, 14),  # ViT-H's patch: 588 values, lines of 42 bytes
        Shape(1, 2, 3, 1, 2, 16),  # ViT-B's: 768 values, lines of 48 bytes
    ],
)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "plain"])
def test_sizes(shape: Shape, normalize: bool) -> None:
    assert_accurate(make(shape), normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert_accurate(make(USUAL, dtype))


def test_under_autocast() -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_accurate(make(USUAL, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_and_a_weight(dtype: torch.dtype) -> None:
    """The loss is scaled as in the objective, with a weight that only affects backward."""
    assert_accurate(make(USUAL, dtype), scale=1 / 24, weight=-2.5)


def test_fp16_keeps_the_gradient_of_a_mean_over_many() -> None:
    """2 / (768 x 600,000) is below the smallest fp16 number; the weight of a gradient scaler makes it representable."""
    inputs = make(Shape(1, 2, 3, 1, 2, 16), torch.float16)
    assert run(inputs, "reference", scale=1 / 600_000)[1].abs().max() < 1e-7
    assert_accurate(inputs, scale=1 / 600_000, weight=65536.0)
    assert run(inputs, "triton", scale=1 / 600_000, weight=65536.0)[1].abs().mean() > 1e-4


def test_next_views_patches_are_targets() -> None:
    """With orthogonal masks and M = K every patch is the target of one view."""
    inputs = make(Shape(2, 3, 2, 3, 2, 4))
    views = torch.rand(2, 6).argsort(1).int().view(2, 3, 2).to(DEVICE)
    assert_accurate(inputs._replace(targets=views.roll(-1, 1)))


def test_any_strides_and_ids_of_64_bits() -> None:
    """Predictions are transposed, the image is a flipped channels-first tensor, and statistics are every second one."""
    inputs = make(USUAL)
    statistics = torch.tensor([0.4, 0, 0.5, 0, 0.6, 0], device=DEVICE)[::2]
    strided = Inputs(
        inputs.predictions.transpose(0, 1).contiguous().transpose(0, 1),
        inputs.images.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        inputs.targets.long().transpose(1, 2).contiguous().transpose(1, 2),
        statistics,
        statistics,
    )
    assert not any(each.is_contiguous() for each in strided)
    assert_accurate(strided)


def test_two_losses_of_the_same_predictions() -> None:
    """Both losses are in one graph, with different weights."""

    def gradient(inputs: Inputs, impl: Any) -> Tensor:
        predictions = inputs.predictions.clone().requires_grad_()
        losses = [pixel_loss(predictions, *inputs[1:], normalize, 0.5, impl) for normalize in (True, False)]
        return torch.autograd.grad(losses[0] + 3 * losses[1], predictions)[0]

    inputs = make(USUAL)
    exact = gradient(inputs._replace(predictions=inputs.predictions.double()), "reference")
    assert_as_accurate(gradient(inputs, "triton"), gradient(inputs, "reference"), exact)


def test_a_second_backward_pass_is_refused() -> None:
    inputs = make(USUAL)
    predictions = inputs.predictions.requires_grad_()
    loss = pixel_loss(predictions, *inputs[1:], True, impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass through pixel_loss"):
        loss.backward()


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted in the interpreter")
def test_pixels_move_once_an_image_and_predictions_once() -> None:
    inputs = make(Shape(2, 3, 3, 3, 9, 2))
    with counting() as launches:
        launch_forward(*inputs, normalize=True, scale=1.0, with_gradient=True)
    moved = launches[-1].traffic
    assert moved["images"].issued == inputs.images.numel()
    assert moved["target_places"].issued == 2 * 3 * 9 * 4
    assert moved["predictions"].issued == moved["d_predictions"].issued == inputs.predictions.numel() * 4


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted in the interpreter")
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_backward_at_weight_1_leaves_the_gradient_where_it_lies(weight: float) -> None:
    predictions = make(USUAL).predictions.requires_grad_()
    loss = pixel_loss(predictions, *make(USUAL)[1:], True, impl="triton")
    with counting() as launches:
        loss.backward(torch.full_like(loss, weight))
    (scaling,) = launches
    moved = 0 if weight == 1 else 2 * predictions.numel() * 4
    assert scaling.traffic["values"].issued == moved
    assert scaling.traffic["weight"].issued == 4


def test_more_values_than_the_programs_of_backward_hold_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are two programs, and three and a half blocks of values."""
    monkeypatch.setattr(sys.modules[launch_backward.__module__], "_SCALING_PROGRAMS", 2)
    values = torch.ones(3 * 2048 + 5, device=DEVICE)
    launch_backward(values, torch.tensor(2.0, device=DEVICE), 1.5)
    assert torch.equal(values, torch.full_like(values, 3))


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_evaluation_makes_no_gradient(how: str) -> None:
    inputs = make(USUAL)
    predictions = inputs.predictions.requires_grad_(how == "no_grad")
    launches: list[Launch] = []
    with torch.set_grad_enabled(how == "detached"), watching(launches.append):
        loss = pixel_loss(predictions, *inputs[1:], True, impl="triton")
    assert not loss.requires_grad
    assert launches[-1].arguments["d_predictions"].numel() == 0
    assert torch.equal(loss, run(inputs, "triton")[0])


def test_repeats_are_bit_equal() -> None:
    inputs = make(Shape(2, 2, 3, 3, 7, 4))
    for first, second in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [Shape(0, 3, 2, 3, 4, 4), Shape(2, 3, 2, 3, 0, 4)], ids=["no image", "no target"])
def test_nothing_to_compare(shape: Shape) -> None:
    loss, d_predictions = run(make(shape), "triton")
    assert loss == 0
    assert d_predictions.numel() == 0


def test_float64_is_left_to_plain_pytorch() -> None:
    inputs = make(USUAL, torch.float64)
    assert run(inputs, "auto")[0].dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        run(inputs, "triton")


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": torch.zeros(2, 12, 48)}, r"predictions are \(B, N, M, 3P\^2\)"),
        ({"predictions": torch.zeros(2, 3, 4, 48, dtype=torch.int32)}, "floating point"),
        ({"predictions": torch.zeros(2, 3, 4, 49)}, "49 pixel values do not fit a patch"),
        ({"predictions": torch.zeros(2, 3, 4, 0)}, "0 pixel values do not fit a patch"),
        ({"predictions": torch.zeros(2, 3, 5, 48)}, "do not fit"),
        ({"images": torch.zeros(2, 8, 12, 3)}, r"images are \(B, H, W, 3\), uint8"),
        ({"images": torch.zeros(2, 3, 8, 12, dtype=torch.uint8)}, r"images are \(B, H, W, 3\), uint8"),
        ({"images": torch.zeros(2, 8, 14, 3, dtype=torch.uint8)}, "8 x 14 pixels do not divide into patches of 4"),
        ({"images": torch.zeros(3, 8, 12, 3, dtype=torch.uint8)}, "3 images do not fit"),
        ({"images": torch.zeros(2, 8, 12, 3, dtype=torch.uint8, device="meta")}, "on meta"),
        ({"targets": torch.zeros(2, 3, 7, dtype=torch.int64)}, "targets lists 7 ids a view, of 6 patches"),
        ({"targets": torch.zeros(2, 3, 4, dtype=torch.uint8)}, "targets is torch.uint8"),
        ({"mean": torch.zeros(1)}, r"mean and std are \(3,\)"),
    ],
)
def test_mistakes_are_told(change: dict[str, Tensor], message: str, impl: Any) -> None:
    arguments = make(USUAL)._asdict()
    arguments |= {name: value if value.is_meta else value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        pixel_loss(**arguments, normalize=True, impl=impl)


def test_the_op_is_registered_as_torch_wants_it() -> None:
    predictions, *rest = make(Shape(1, 1, 1, 2, 1, 2))
    torch.library.opcheck(_pixel_loss, (predictions.clone().requires_grad_(), *rest, True, 0.5, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(dtype: torch.dtype) -> None:
    """The weight is not representable in bf16."""
    inputs = make(USUAL, dtype)
    loss, d_predictions = run(inputs, "triton", scale=0.5, weight=1 / 3)
    compiled = torch.compile(pixel_loss, fullgraph=True, backend="aot_eager")
    predictions = inputs.predictions.clone().requires_grad_()
    ours = compiled(predictions, *inputs[1:], True, 0.5, "triton")
    assert torch.equal(ours, loss)
    assert torch.equal(torch.autograd.grad(ours / 3, predictions)[0], d_predictions)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 4, 14, 14, 147, 16),  # ViT-B/16
        Shape(64, 4, 14, 14, 49, 16),  # the next view's patches
        Shape(32, 4, 16, 16, 192, 14),  # ViT-H/14
        Shape(64, 1, 8, 8, 48, 4),  # CIFAR
    ],
)
def test_production_sizes(shape: Shape, dtype: torch.dtype) -> None:
    assert_accurate(make(shape, dtype), scale=1 / (shape.B * shape.N * shape.M), weight=128.0)


@pytest.mark.gpu
def test_many_repeats_are_bit_equal() -> None:
    inputs = make(Shape(64, 4, 14, 14, 147, 16), torch.bfloat16)
    first = run(inputs, "triton")
    for _ in range(250):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(inputs, "triton"), first, strict=True))


@pytest.mark.gpu
def test_predictions_past_2_31_elements() -> None:
    """Two images are repeated 4,096 times: 32,768 views of 147 patches of 768. The last two are compared with a small
    batch.
    """
    pair = make(Shape(2, 4, 14, 14, 147, 16), torch.bfloat16)
    inputs = Inputs(*(each.repeat(4096, *[1] * (each.dim() - 1)) if each.dim() > 1 else each for each in pair))
    assert inputs.predictions.numel() > 2**31
    _, d_predictions = launch_forward(*inputs, normalize=True, scale=1.0, with_gradient=True)
    launch_backward(d_predictions, torch.tensor(2.0, device=DEVICE), 1.0)
    exact = run(pair._replace(predictions=pair.predictions.double()), "reference", weight=2.0)[1]
    assert_as_accurate(d_predictions[-2:], run(pair, "reference", weight=2.0)[1], exact)


MUTANTS = Mutants(
    "pixel_loss",
    __name__,
    {
        "usual": lambda patch: test_sizes(USUAL, True),
        "shares": lambda patch: test_sizes(Shape(1, 2, 3, 3, 9, 1), False),
        "weight": lambda patch: test_a_mean_and_a_weight(torch.float32),
    },
    [
        ("the unbiased variance", "usual", "/ (SIZE - 1)", "/ SIZE"),
        (
            "the mask of a variance",
            "usual",
            "tl.where(inside, target - tl.sum(target, 0) / SIZE, 0)",
            "target - tl.sum(target, 0) / SIZE",
        ),
        (
            "the last patch of a share",
            "shares",
            "for patch in range(first, last):",
            "for patch in range(first, last - 1):",
        ),
        ("the last view", "usual", "for view in range(views):", "for view in range(views - 1):"),
        (
            "the channel of a value",
            "usual",
            "tl.where(channel == 1, green, blue)",
            "tl.where(channel == 1, blue, green)",
        ),
        ("the line pitch", "usual", "line * pitch + byte", "line * (3 * PATCH) + byte"),
        ("the weight that backward learns of", "weight", "value * factor, mask", "value, mask"),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
