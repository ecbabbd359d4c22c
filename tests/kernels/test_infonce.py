"""Tests of `infonce_lse` and `infonce_grad` against float64 and against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimae import kernels
from mimae.kernels import infonce, infonce_grad, infonce_lse, reference
from mimae.kernels.infonce import Tiles, _infonce_grad, _infonce_lse
from mimae.kernels.runtime import H100, Launch, Target, watching
from mimae.objective.infonce import InfoNCE
from tests.kernels.accuracy import DEVICE, assert_as_accurate
from tests.kernels.mutants import Check, Mutants, mutant_tests
from tests.oracles import infonce_oracle

# Lanes past the edge compute with nothing; their results are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")


def use_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    monkeypatch.setattr(infonce, "_tiles", lambda *_: Tiles(rows, columns, depth=16, warps=4, stages=2))


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles of 64 rows and 32 columns, in steps of 16, so that small sizes have several (GPU: real tiles)."""
    if not request.node.get_closest_marker("gpu"):
        use_tiles(monkeypatch, 64, 32)


def latents(images: int, views: int, width: int, dtype: torch.dtype = torch.float32, draw: int = 0) -> Tensor:
    """Return unit vectors (B, N, D) whose memory is followed by NaN, so that reads beyond the end are detected."""
    generator = torch.Generator().manual_seed(images + views + width + 1000 * draw)
    memory = torch.full((images + 64, views, width), math.nan, dtype=dtype, device=DEVICE)
    memory[:images] = F.normalize(torch.randn(images, views, width, generator=generator), dim=-1).to(DEVICE, dtype)
    return memory[:images]


def of_tau(tau: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([tau], device=DEVICE, dtype=dtype)


def results(u: Tensor, tau: Tensor, lse: Tensor, rows: slice, **impl: Any) -> list[Tensor]:
    """Return the results of both ops for a part of the rows; the second gets the log-sum-exps of all rows."""
    arguments = u[rows], u, rows.start or 0, tau
    lse_op, grad_op = (infonce_lse, infonce_grad) if impl else (reference.infonce_lse, reference.infonce_grad)
    return [*lse_op(*arguments, **impl), *grad_op(*arguments, lse, **impl)]


def trained(u: Tensor, tau: Tensor, rows: slice, **impl: Any) -> list[Tensor]:
    """Return the results as in training: each rank computes the log-sum-exps of its rows."""
    first, end, _ = rows.indices(len(u))
    parts = [part for part in (slice(0, first), slice(first, end), slice(end, len(u))) if part.start < part.stop]
    lse_op = infonce_lse if impl else reference.infonce_lse
    return results(u, tau, torch.cat([lse_op(u[each], u, each.start, tau, **impl)[0] for each in parts]), rows, **impl)


def computed(u: Tensor, tau: float, rows: slice) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the results of the kernels, of plain PyTorch and of float64."""
    fused, plain = trained(u, of_tau(tau), rows, impl="triton"), trained(u, of_tau(tau), rows)
    return fused, plain, trained(u.double(), of_tau(tau).double(), rows)


def assert_accurate(u: Tensor, tau: float, rows: slice = slice(None)) -> None:
    """Assert accuracy. d_tau is one number with a random error: a sum of two terms per pair of views, up to 1/tau^2."""
    _, views, _ = u.shape
    pairs = len(u[rows]) * views * (views - 1)
    assert_as_accurate(*computed(u, tau, rows), [None, None, None, 2 * pairs * (1 + 1 / tau) / tau**2])


EPS = torch.finfo(torch.float32).eps


def of_weights(tau: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the allowed rounding error of a weight, exp(score - lse), which is at most 1.

    Its exponent is a difference of two rounded numbers of about 1/tau. The weight is rounded itself, and again in a
    product of `dtype`. The bound is eight times that.
    """
    return 8 * (EPS / tau + torch.finfo(dtype).eps)


ONE_RANK = {
    "two images, three views: a view is row of one pair and column of another": (2, 3, 7),
    "prime, one over a step of D": (13, 3, 17),
    "one over a tile of rows and two of columns: two panels, the second of one row": (65, 2, 5),
    "8 views": (2, 8, 9),
    "so narrow that the parts of shared scores would pass the latents": (65, 2, 2),
}


@pytest.mark.parametrize("sizes", ONE_RANK.values(), ids=ONE_RANK)
def test_one_rank_against_float64(sizes: tuple[int, int, int]) -> None:
    assert_accurate(latents(*sizes), tau=0.5)


def test_one_image() -> None:
    """The softmax over one image is 1 for all views, so the gradient is zero."""
    u = latents(1, 2, 3)
    lse, positives, d_u, d_tau = results(
        u, of_tau(0.5), infonce_lse(u, u, 0, of_tau(0.5))[0], slice(None), impl="triton"
    )
    assert positives.abs().max() > 0.1
    assert (lse - positives).abs().max() < 8 * EPS / 0.5
    assert d_u.abs().max() < 2 * of_weights(0.5) / 0.5  # as a row and as a column
    assert d_tau.abs() < 2 * of_weights(0.5) / 0.5**2


MANY_RANKS = {
    "odd rows from an odd place on: columns split for the gradient": (37, 3, 9, slice(11, 16)),
    "the last row; an even number of views": (20, 4, 5, slice(19, 20)),
    "more than half of the columns, so no split; over a tile of rows and a step of D": (70, 2, 18, slice(3, 68)),
}


@pytest.mark.parametrize("sizes", MANY_RANKS.values(), ids=MANY_RANKS)
def test_rows_of_a_rank_against_float64(sizes: tuple[int, int, int, slice]) -> None:
    assert_accurate(latents(*sizes[:3]), 0.5, rows=sizes[3])


def test_a_panel_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of rows are narrower than those of columns, and the panel has room for all three tiles of rows."""
    use_tiles(monkeypatch, 16, 32)
    assert_accurate(latents(33, 2, 49), 0.5)


@pytest.mark.parametrize("tau", [0.02, 0.5])
def test_runs_of_several_tiles(tau: float) -> None:
    """On a GPU with one multiprocessor a program processes two of the three tiles of columns."""
    u, rows = latents(65, 3, 5), slice(60, 64)
    with watching(lambda _: None, Target(90, processors=1)):
        fused = infonce_lse(u[rows], u, 60, of_tau(tau), impl="triton")
    plain, exact = (reference.infonce_lse(each[rows], each, 60, of_tau(tau).to(each.dtype)) for each in (u, u.double()))
    assert_as_accurate(fused, plain, exact)


@pytest.mark.parametrize(
    ("rows", "tau"),
    [
        *((slice(None), tau) for tau in (0.01, 0.024, 0.026)),
        (slice(3, 8), 0.024),
        pytest.param(slice(None), 10.0, marks=pytest.mark.slow),
        *(pytest.param(slice(3, 8), tau, marks=pytest.mark.slow) for tau in (0.01, 0.026, 10.0)),
    ],
    ids=lambda value: ("one rank" if value == slice(None) else "many") if isinstance(value, slice) else str(value),
)
def test_temperatures(rows: slice, tau: float) -> None:
    """The kernels use a common exponential from 0.025 on, and own maxima below.

    35 images are three more than a tile of columns. There are eight draws, because the error of d_tau, a single number,
    is random. Many ranks run most temperatures only among the slow tests: they share this code with one rank.
    """
    draws = [computed(latents(35, 2, 6, draw=draw), tau, rows) for draw in range(8)]
    assert_as_accurate(
        *([torch.stack(each) for each in zip(*of_kind, strict=True)] for of_kind in zip(*draws, strict=True))
    )


@pytest.mark.parametrize(
    "tau", [0.01, *(pytest.param(tau, marks=pytest.mark.slow) for tau in (0.0156, 0.024)), 0.0281, 0.07]
)
def test_views_that_nearly_agree(tau: float) -> None:
    """The loss is a small difference of scores near 1/tau, and d_tau is their sum with small weights.

    A common error of all scores has to cancel. For tau 0.0156 and 0.0281 the rounding of 1/tau and of its product with
    log2 e is largest in fp32. The results are means over 768 rows, whose rounding averages out: the error of a score is
    its last bit, and that of a weight, whose exponent is near 1/tau, is that times 1/tau. Eight and ten deviations of
    such means are allowed.
    """
    losses, weights = [], []
    for draw in range(8):
        u = F.normalize(latents(48, 1, 16, draw=draw) + 0.1 * latents(48, 2, 16, draw=draw), dim=-1)
        fused, _, exact = computed(u, tau, slice(None))
        losses.append((fused[0].double() - fused[1] - (exact[0] - exact[1])).mean() * tau)
        weights.append((fused[3].double() - exact[3]).sum() * tau**2 / (48 * 2))
    deviation = EPS / 12**0.5 / 768**0.5
    assert torch.stack(losses).mean().abs() < 8 * deviation
    assert torch.stack(weights).mean().abs() < 10 * deviation / tau


@pytest.mark.parametrize("tau", [0.02, 0.07])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tau: float) -> None:
    """Rounded vectors may be longer than 1. Sizes are odd: three more than a tile of columns, one more than a step of
    D.
    """
    u = latents(35, 2, 17, dtype)
    assert u.float().norm(dim=-1).max() > 1
    assert_accurate(u, tau)
    assert_accurate(u, tau, rows=slice(5, 14))


@pytest.mark.parametrize("tau", [0.01, 0.0251, 0.07, 10.0])
def test_equal_latents(tau: float) -> None:
    """The log-sum-exp is log B + 1/tau, and the gradient is zero, because all pulls cancel."""
    u = F.normalize(torch.ones(33, 2, 4, device=DEVICE), dim=-1)
    lse, positives, d_u, d_tau = results(
        u, of_tau(tau), infonce_lse(u, u, 0, of_tau(tau))[0], slice(None), impl="triton"
    )
    off = ~torch.eye(2, dtype=torch.bool, device=DEVICE)
    assert (lse[:, off] * tau - (math.log(33) * tau + 1)).abs().max() < 8 * EPS * (1 + math.log(33) * tau)
    assert (positives[:, off] * tau - 1).abs().max() < 8 * EPS
    assert d_u.abs().max() * tau < 2 * of_weights(tau)  # as a row and as a column
    assert d_tau.abs() * tau**2 < 33 * 2 * of_weights(tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tau", [0.0251, 0.0249, 0.01])
def test_opposite_views(tau: float, dtype: torch.dtype) -> None:
    """Every score is -1/tau, the largest distance below the constant shift, for tau on both sides of the switch.

    There is one image more than a tile, so that weights of missing images would overflow fp16.
    """
    u = F.normalize(torch.ones(33, 2, 4, device=DEVICE, dtype=dtype), dim=-1)
    u[:, 1] *= -1
    lse, _ = infonce_lse(u, u, 0, of_tau(tau), impl="triton")
    assert (lse[:, 0, 1] - (math.log(33) - 1 / tau)).abs().max() < 8 * EPS / tau
    d_u, _ = infonce_grad(u, u, 0, of_tau(tau), lse, impl="triton")
    assert d_u.abs().max() * tau < 2 * of_weights(tau, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_scores(dtype: torch.dtype) -> None:
    """Views of an image nearly agree, and images do not.

    The pulls of a positive, near 2 / tau, cancel to a rest far below the rounding of bf16 (0.08). So the weights are
    fp32 in bf16, too.
    """
    tau = 0.05
    u = F.normalize(latents(7, 1, 40).expand(7, 3, 40) + 0.02 * latents(7, 3, 40), dim=-1).to(dtype)
    lse = reference.infonce_lse(u.double(), u.double(), 0, of_tau(tau).double())[0]
    exact = results(u.double(), of_tau(tau).double(), lse, slice(None))
    fused = results(u, of_tau(tau), lse.float(), slice(None), impl="triton")
    # Each latent has gradients as a row and as a column of two sibling views; 42 pairs contribute to d_tau.
    bounds = [8 * EPS / tau, 8 * EPS / tau, 4 * of_weights(tau) / tau, 42 * 2 * of_weights(tau) / tau**2]
    assert bounds[2] < 0.08 / 40
    for got, wanted, bound in zip(fused, exact, bounds, strict=True):
        assert (got - wanted).abs().max() < bound


@pytest.mark.parametrize("tau", [0.02, 0.2])
def test_against_the_definition(tau: float) -> None:
    """Loss, gradient and d_tau equal the oracle's. Its latents have any length, so only the gradient normal to u
    counts.
    """
    u = latents(5, 3, 7)
    lse, positives, d_u, d_tau = (
        each.cpu().double()
        for each in results(u, of_tau(tau), infonce_lse(u, u, 0, of_tau(tau))[0], slice(None), impl="triton")
    )
    z, temperature = u.cpu().double().requires_grad_(), of_tau(tau).cpu().double().requires_grad_()
    terms = 5 * 3 * 2
    loss = infonce_oracle.l_max(z, temperature) * terms
    d_z, wanted = torch.autograd.grad(loss, (z, temperature))
    normal = d_u - (d_u * z.detach()).sum(-1, keepdim=True) * z.detach()
    assert abs((lse - positives).sum() - loss) < terms * 8 * EPS / tau
    assert (normal - d_z).abs().max() < 4 * of_weights(tau) / tau  # as a row and as a column of two siblings
    assert abs(d_tau - wanted) < terms * 2 * of_weights(tau) / tau**2 < wanted.abs() / 1000
    assert not lse.diagonal(0, 1, 2).any() and not positives.diagonal(0, 1, 2).any()


@pytest.mark.parametrize("step", [5, 1], ids=["one rank", "ranks of one image"])
def test_the_reference_has_the_gradient_of_its_own_sum(step: int) -> None:
    """The gradient is right along u too, which the comparison with the definition does not show."""
    u, tau = latents(5, 3, 7).double().requires_grad_(), of_tau(0.2).double().requires_grad_()
    lse, positives = reference.infonce_lse(u, u, 0, tau)
    wanted = torch.autograd.grad((lse - positives).sum(), (u, tau))
    parts = [
        reference.infonce_grad(u.detach()[i : i + step], u.detach(), i, tau.detach(), lse.detach())
        for i in range(0, 5, step)
    ]
    assert (torch.cat([d_u for d_u, _ in parts]) - wanted[0]).abs().max() < 1e-12
    assert (torch.stack([d_tau for _, d_tau in parts]).sum(0) - wanted[1]).abs().max() < 1e-10


def test_ranks_have_together_what_one_has() -> None:
    """Two ranks have 17 rows each, which is no multiple of a tile, so a tile's edge is inside each part."""
    u, tau = latents(34, 2, 6), of_tau(0.1)
    lse, positives = infonce_lse(u, u, 0, tau, impl="triton")
    d_u, d_tau = infonce_grad(u, u, 0, tau, lse, impl="triton")
    parts = [results(u, tau, lse, slice(start, start + 17), impl="triton") for start in (0, 17)]
    for place, (whole, bound) in enumerate(((lse, 8 * EPS), (positives, 8 * EPS), (d_u, 2 * of_weights(0.1)))):
        assert (torch.cat([part[place] for part in parts]) - whole).abs().max() < bound / 0.1
    assert (parts[0][3] + parts[1][3] - d_tau).abs() < 34 * 2 * 2 * of_weights(0.1) / 0.1**2 < d_tau.abs() / 1000


@pytest.mark.parametrize("rows", [slice(None), slice(3, 8)], ids=["one rank", "many"])
def test_equal_inputs_give_equal_bits(rows: slice) -> None:
    u, tau = latents(35, 2, 6), of_tau(0.1)
    lse = reference.infonce_lse(u, u, 0, tau)[0]
    runs = [results(u, tau, lse, rows, impl="triton") for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_inputs_that_are_not_contiguous() -> None:
    u = latents(5, 2, 6)
    lse = reference.infonce_lse(u, u, 0, of_tau(0.1))[0]
    scattered = u.transpose(0, 2).contiguous().transpose(0, 2), lse.transpose(0, 2).contiguous().transpose(0, 2)
    for got, wanted in zip(
        results(scattered[0], of_tau(0.1), scattered[1], slice(1, 4), impl="triton"),
        results(u, of_tau(0.1), lse, slice(1, 4), impl="triton"),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_autocast_changes_nothing() -> None:
    u, tau = latents(5, 2, 6), of_tau(0.1)
    lse = reference.infonce_lse(u, u, 0, tau)[0]
    outside = results(u, tau, lse, slice(None), impl="triton")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = results(u, tau, lse, slice(None), impl="triton")
        plain = results(u, tau, lse, slice(None))
    for got, wanted, of_reference in zip(inside, outside, plain, strict=True):
        assert torch.equal(got, wanted)
        assert got.dtype == of_reference.dtype


def test_registration() -> None:
    u, tau = latents(3, 2, 4), of_tau(0.1)
    torch.library.opcheck(_infonce_lse, (u[1:], u, 1, tau))
    torch.library.opcheck(_infonce_grad, (u[1:], u, 1, tau, torch.ones(3, 2, 2, device=DEVICE)))


def test_the_objective_trains_through_it_compiled_and_twice_in_one_graph() -> None:
    def loss(u: Tensor, tau: Tensor) -> Tensor:
        other = u.flip(0) * 0.5
        return InfoNCE.apply(u, u.detach(), tau) + InfoNCE.apply(other, other.detach(), tau)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        u, tau = latents(5, 2, 6).requires_grad_(), of_tau(0.1).requires_grad_()
        value = function(u, tau)
        return value.detach(), *torch.autograd.grad(value, (u, tau))

    wanted = gradients(loss)
    with kernels.prefer("triton"):
        eager = gradients(loss)
        compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    # The sums are of two means over pairs; a latent contributes to four of the ten pairs.
    bounds = [2 * 8 * EPS / 0.1, 2 * of_weights(0.1) / 0.1, 2 * 2 * of_weights(0.1) / 0.1**2]
    for ours, again, theirs, bound in zip(eager, compiled, wanted, bounds, strict=True):
        assert torch.equal(ours, again)
        assert (ours - theirs).abs().max() < bound < theirs.abs().max() / 1000


def test_float64_runs_in_plain_pytorch_and_never_in_triton() -> None:
    u, tau = latents(3, 2, 4).double(), of_tau(0.1).double()
    assert torch.equal(infonce_lse(u, u, 0, tau)[0], reference.infonce_lse(u, u, 0, tau)[0])
    with pytest.raises(ValueError, match="float32"):
        infonce_lse(u, u, 0, tau, impl="triton")


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "views differ": ("rows are", {"rows": torch.ones(2, 3, 4)}),
    "no rows": ("rows are", {"rows": torch.ones(0, 2, 4)}),
    "one view": ("at least 2", {"rows": torch.ones(2, 1, 4), "columns": torch.ones(5, 1, 4)}),
    "rows past the end": ("not among", {"offset": 4}),
    "negative offset": ("not among", {"offset": -1}),
    "tau without a dimension": ("tau is", {"tau": torch.tensor(0.1)}),
    "lse of the rank's rows alone": ("of all rows", {"lse": torch.ones(2, 2, 2)}),
    "dtypes differ": ("one floating dtype", {"rows": torch.ones(2, 2, 4, dtype=torch.bfloat16)}),
    "integers": ("one floating dtype", {"rows": torch.ones(2, 2, 4).int(), "columns": torch.ones(5, 2, 4).int()}),
    "another device": ("rows are on", {"tau": torch.ones(1, device="meta")}),
}


@pytest.mark.parametrize(("message", "change"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_mistakes(message: str, change: dict[str, Any], impl: Any) -> None:
    arguments: dict[str, Any] = {
        "rows": torch.ones(2, 2, 4),
        "columns": torch.ones(5, 2, 4),
        "offset": 1,
        "tau": torch.ones(1),
        "lse": torch.ones(5, 2, 2),
    }
    with pytest.raises(ValueError, match=message):
        infonce_grad(**arguments | change, impl=impl)


# At sizes of training, without running: the launchers get tensors without values, also for tau.


@pytest.fixture
def real_tiles(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    yield


def launches(b: int, images: int, views: int, width: int, dtype: torch.dtype) -> dict[str, list[Launch]]:
    seen: dict[str, list[Launch]] = {}
    u = torch.empty(images, views, width, dtype=dtype, device="meta")
    tau, lse = torch.empty(1, device="meta"), torch.empty(images, views, views, device="meta")
    with watching(lambda launch: seen.setdefault(launch.kernel.__name__, []).append(launch), H100):
        infonce.launch_forward(u[:b], u, 0, tau)
        infonce.launch_backward(u[:b], u, 0, tau, lse)
    return seen


PRODUCTION = {
    "ViT-B": (4096, 4096, 4, 768),
    "ViT-H": (4096, 4096, 4, 1280),
    "ViT-L, two views": (8192, 8192, 2, 1024),
    "256 of a rank": (256, 4096, 4, 768),
    "a batch that no GPU trains": (1 << 17, 1 << 17, 4, 768),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", PRODUCTION.values(), ids=PRODUCTION)
def test_memory_is_of_the_order_of_the_latents(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, real_tiles: None
) -> None:
    seen = launches(*sizes, dtype)
    _, images, views, width = sizes
    gradient = 4 * images * views * width
    for kernel, name in (
        ("_partial_kernel", "partial"),
        ("_weights_kernel", "panel"),
        ("_accumulate_kernel", "gradients"),
    ):
        held = seen[kernel][0].arguments[name]
        assert held.numel() * held.element_size() <= gradient


def test_few_rows_fill_the_gpu(real_tiles: None) -> None:
    for each in launches(256, 4096, 4, 768, torch.bfloat16).values():
        if each[0].kernel.__name__ != "_merge_kernel":
            assert math.prod(each[0].grid) >= 2 * H100.processors


# On a GPU, with the tiles of training


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("images", "views", "width", "rows"),
    [
        (1024, 4, 768, slice(None)),
        (1000, 2, 1280, slice(None)),
        (4096, 4, 768, slice(256, 512)),
        (4096, 2, 1000, slice(None)),
    ],
)
@pytest.mark.parametrize("tau", [0.02, 0.07])
def test_sizes_of_training(images: int, views: int, width: int, rows: slice, tau: float, dtype: torch.dtype) -> None:
    assert_accurate(latents(images, views, width, dtype), tau, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [slice(None), slice(256, 512)], ids=["one rank", "many"])
def test_250_repeats_give_equal_bits(rows: slice) -> None:
    u, tau = latents(1024, 4, 768, torch.bfloat16), of_tau(0.07)
    lse = infonce_lse(u, u, 0, tau)[0]
    first = results(u, tau, lse, rows, impl="triton")
    for _ in range(249):
        assert all(torch.equal(*pair) for pair in zip(first, results(u, tau, lse, rows, impl="triton"), strict=True))


@pytest.mark.gpu
def test_offsets_past_2_to_the_31() -> None:
    """The last 16 of 600,000 images are tested, whose latents are beyond element 2^31."""
    # They are drawn on the GPU, because a host may not have 5 GB.
    u = torch.empty(600_000, 2, 2048, dtype=torch.bfloat16, device=DEVICE).normal_()
    u /= u.norm(dim=-1, keepdim=True)
    rows, tau = slice(600_000 - 16, 600_000), of_tau(0.07)
    lse = torch.full((600_000, 2, 2), 20.0, device=DEVICE)
    for got, wanted in zip(results(u, tau, lse, rows, impl="triton"), results(u, tau, lse, rows), strict=True):
        assert (got - wanted).abs().max() < 2e-2 * wanted.abs().max()


def _one_rank(size: str) -> Check:
    def check(patch: pytest.MonkeyPatch) -> None:
        use_tiles(patch, 64, 32)
        test_one_rank_against_float64(ONE_RANK[size])

    return check


def _near_views(tau: float) -> Check:
    def check(patch: pytest.MonkeyPatch) -> None:
        use_tiles(patch, 64, 32)
        test_views_that_nearly_agree(tau)

    return check


def _a_rank(patch: pytest.MonkeyPatch) -> None:
    use_tiles(patch, 64, 32)
    test_rows_of_a_rank_against_float64((37, 3, 9, slice(11, 16)))


MUTANTS = Mutants(
    "infonce",
    __name__,
    {
        "prime": _one_rank("prime, one over a step of D"),
        "panels": _one_rank("one over a tile of rows and two of columns: two panels, the second of one row"),
        "a rank's": _a_rank,
        "own maxima": _near_views(0.0156),
        "shared exponential": _near_views(0.0281),
    },
    [
        (
            "the last step of the product",
            "prime",
            "for first in range(0, D, DEPTH):",
            "for first in range(0, D - DEPTH, DEPTH):",
        ),
        (
            "the mask of D",
            "prime",
            "(j < rights)[None, :] & (k < D - first)[:, None]",
            "(j < rights)[None, :] & (k < D)[:, None]",
        ),
        (
            "the mask of columns in a denominator",
            "prime",
            "there = (rows < b)[:, None] & (columns < B)[None, :]",
            "there = (rows < b)[:, None] & (columns < 64)[None, :]",
        ),
        (
            "the sibling of a denominator",
            "prime",
            "right = _latents(u, start, other, N, D)\n        tile",
            "right = _latents(u, start, view, N, D)\n        tile",
        ),
        (
            "the last part of a row's sum",
            "panels",
            "for first in range(0, parts, PARTS):\n            part = first + tl.arange(0, PARTS)",
            "for first in range(0, parts, PARTS):\n            part = first + 1 + tl.arange(0, PARTS)",
        ),
        ("the positive in the gradient", "prime", "weights - 32768", "weights"),
        (
            "the weights as columns",
            "prime",
            "(from_rows[:, None] + from_columns[None, :])",
            "(from_rows[:, None] + 0 * from_columns[None, :])",
        ),
        (
            "the sibling of a gradient",
            "a rank's",
            "right = _latents(u, begin, other, N, D)",
            "right = _latents(u, begin, view, N, D)",
        ),
        (
            "the second panel",
            "panels",
            "for start in range(0, b, height):",
            "for start in range(0, min(b, height), height):",
        ),
        (
            "half of d_tau, which rows and columns share",
            "a rank's",
            "        share *= 0.5\n",
            "        share *= 1.0\n",
        ),
        (
            "1/tau as forward rounds it",
            "own maxima",
            "scores = products * inverse\n            weights",
            "scores = products / tl.load(tau)\n            weights",
        ),
        (
            "log2 e as forward has it",
            "shared exponential",
            "shares = tl.exp2(products * slope - slope + 14)",
            "shares = tl.exp2(products * (1.442694 * inverse) - slope + 14)",
        ),
    ],
)

test_an_unchanged_copy_passes, test_a_mutant_fails = mutant_tests(MUTANTS)
