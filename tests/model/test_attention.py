"""Tests of attention: every backend that runs here computes softmax(q k^T / sqrt(d)) v, the others report a reason.

The choice of a backend is based on a measurement of the model's calls.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mimae.config.load import load_recipe
from mimae.model import attention_choice
from mimae.model.attention import BACKENDS, PACKED, obstacle
from mimae.model.attention_choice import Call, calls, choose
from mimae.model.masking import views
from mimae.model.mimae import build

CPU = torch.device("cpu")
# An odd number of heads; more keys than queries; 50 tokens are an encoder's view at ViT-B.
SHAPES = {"q": (2, 3, 7, 16), "k": (2, 3, 50, 16), "v": (2, 3, 50, 16)}


def inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Scores have deviation 3, so that a softmax over the wrong axis or a missing 1/sqrt(d) is detected.
    return [(torch.randn(shape, generator=generator) * 3**0.5).to(device, dtype) for shape in SHAPES.values()]


def off(v: Tensor) -> float:
    """Return the allowed rounding error of attention's output in fp32.

    The output is a mean of the values. Scores of up to 12 are sums of 16 terms, and torch's exp may be wrong by 20 last
    bits, so a weight may be wrong by at most 64 last bits.
    """
    return 64 * torch.finfo(torch.float32).eps * v.abs().max().item()


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.exp(q @ k.transpose(-1, -2) / 4)
    return scores / scores.sum(-1, keepdim=True) @ v


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "plain", "flex"])
def test_forward(backend: str) -> None:
    q, k, v = inputs(torch.float32, CPU)
    expected = formula(q.double(), k.double(), v.double())
    assert (BACKENDS[backend](q, k, v) - expected).abs().max() < off(v)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "plain"])
def test_gradients(backend: str) -> None:
    qkv = [x.requires_grad_() for x in inputs(torch.float64, CPU)]
    weights = torch.randn(SHAPES["q"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((BACKENDS[backend](*qkv) * weights).sum(), qkv)
    expected = torch.autograd.grad((formula(*qkv) * weights).sum(), qkv)
    assert all(torch.dist(a, b) < 1e-12 * b.norm() for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", PACKED)
def test_packed_queries_keys_and_values(backend: str) -> None:
    """The number of heads is odd. A transposed head or exchanged parts of the gradient would change the sums."""
    generator = torch.Generator().manual_seed(0)
    packed = (2 * torch.randn(2, 7, 3 * 3 * 4, generator=generator, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 7, 3 * 4, generator=generator, dtype=torch.float64)
    q, k, v = (x.view(2, 7, 3, 4).transpose(1, 2) for x in packed.chunk(3, -1))
    expected = [(torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v).transpose(1, 2).flatten(2)]
    found = [PACKED[backend](packed, 3)]
    for out in (expected, found):
        out += torch.autograd.grad((out[0] * weights).sum(), packed)
    assert all(torch.dist(a, b) < 1e-13 * b.norm() for a, b in zip(found, expected))
    assert torch.autograd.gradcheck(lambda x: PACKED[backend](x, 3), packed)


@pytest.mark.parametrize(
    ("backend", "where"),
    [("plain", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in BACKENDS)],
)
def test_in_bf16_against_the_formula(backend: str, where: str) -> None:
    """The allowed error is slightly more than twice that of the formula in the same dtype."""
    device, dtype = torch.device(where), torch.bfloat16
    reason = obstacle(backend, device, dtype, [16])
    if reason is not None:
        pytest.skip(reason)
    exact = [x.double().requires_grad_() for x in inputs(dtype, device)]
    truth = [formula(*exact)]
    weights = torch.randn_like(truth[0])
    truth += torch.autograd.grad((truth[0] * weights).sum(), exact)

    def errors(function: object) -> list[float]:
        qkv = [x.requires_grad_() for x in inputs(dtype, device)]
        found = [function(*qkv)]  # type: ignore[operator]
        found += torch.autograd.grad((found[0] * weights).sum(), qkv)
        return [(torch.dist(a.double(), b) / b.norm()).item() for a, b in zip(found, truth)]

    assert all(ours <= 2 * theirs + 1e-3 for ours, theirs in zip(errors(BACKENDS[backend]), errors(formula)))


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle("sdpa", CPU, torch.bfloat16, [8, 32]) is None
    if not torch.cuda.is_available():
        assert "Error" in str(obstacle("cudnn", CPU, torch.bfloat16, [64]))
    assert "does not support backward on CPU" in str(obstacle("flex", CPU, torch.float32, [32]))
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert str(obstacle("xformers", CPU, torch.float32, [32])).startswith("ModuleNotFoundError: ")


def test_an_operator_that_is_missing_for_one_width_of_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement of xformers computes only heads of width 32, in its own layout (tokens before heads)."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] != 32:
            raise NotImplementedError(f"No operator found for heads of {q.shape[-1]}\nand a long list")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return formula(q * 4 / 32**0.5, k, v).transpose(1, 2)

    ops = ModuleType("xformers.ops")
    vars(ops)["memory_efficient_attention"] = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    assert obstacle("xformers", CPU, torch.float32, [32]) is None
    assert (
        obstacle("xformers", CPU, torch.float32, [32, 48]) == "NotImplementedError: No operator found for heads of 48"
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 32, generator=generator) for tokens in (7, 50, 50))
    assert (BACKENDS["xformers"](q, k, v) - BACKENDS["sdpa"](q, k, v)).abs().max() < 2 * off(v)


# The choice

CALLS = [Call(8, 3, 17, 17, 32, 4), Call(8, 2, 48, 65, 32, 1)]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="self attention"),
        pytest.param(["decoder.depth=1"], id="one block, which computes targets alone"),
        pytest.param(["decoder.attention=cross", "decoder.predict=next_view"], id="cross attention, next view"),
    ],
)
def test_the_calls_are_those_that_the_model_makes(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[tuple[int, ...], int] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = (*q.shape[:3], k.shape[2], q.shape[3])
        made[key] = made.get(key, 0) + 1
        return BACKENDS["sdpa"](q, k, v)

    monkeypatch.setitem(BACKENDS, "auto", spy)
    given = ["schedule.batch_size=12", "schedule.accumulate=2", "decoder.depth=3", "data.image_size=[16,24]"]
    recipe = load_recipe("quickstart", [*given, *overrides]).recipe
    images = torch.zeros(3, 16, 24, 3, dtype=torch.uint8)  # This is the micro-batch of one of two ranks.
    build(recipe)(images, *views(recipe, 0, 0, torch.arange(3)))
    assert made == {call[:5]: call.times for call in calls(recipe, 2) if call.times}


def test_the_faster_backend_is_chosen_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of equal speed does not replace the default."""
    seconds = {"sdpa": 2e-3, "plain": 1e-3}
    monkeypatch.setattr(attention_choice, "_seconds", lambda name, *_: seconds[name])
    told = "measured here (ms of a forward and backward: sdpa 10, plain 5)"
    assert choose(CALLS, CPU, torch.bfloat16) == ("plain", told)
    seconds["plain"] = 1.9e-3
    assert choose(CALLS, CPU, torch.bfloat16)[0] == "sdpa"
    assert choose([], CPU, torch.bfloat16)[0] == "sdpa"


def test_a_backend_that_fails_on_the_steps_shapes_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_choice._seconds

    def seconds(name: str, call: Call, *others: Any) -> float:
        if name == failing and call.queries == 48:
            raise RuntimeError("No execution plan")
        return real(name, call, *others)

    monkeypatch.setattr(attention_choice, "_seconds", seconds)
    failing = "plain"
    name, told = choose(CALLS, CPU, torch.float32)
    assert name == "sdpa" and "plain failed" in told
    failing = "sdpa"
    with pytest.raises(RuntimeError, match="No execution plan"):
        choose(CALLS, CPU, torch.float32)


def test_measuring_leaves_the_random_numbers_of_the_run_alone() -> None:
    before = torch.get_rng_state()
    choose(CALLS, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_step_is_measured_on_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of equal length take equal time, so the parts' times are scaled to the whole."""
    asked = []

    def seconds(name: str, call: Call, *_: object) -> float:
        asked.append(call)
        return 1e-3 * call.sequences

    monkeypatch.setattr(attention_choice, "_seconds", seconds)
    monkeypatch.setattr(attention_choice, "SECONDS", 0.0)
    (large,) = [Call(4096, 16, 197, 197, 32, 8)]
    found = attention_choice.measured(["sdpa"], [large], CPU, torch.float32)
    assert found["sdpa"] == pytest.approx(8 * 4096e-3)
    assert len(asked) == 2 and 0 < asked[0].sequences * 16 * 197**2 <= attention_choice.SCORES["cpu"]


def test_cudnn_leaves_fp32_to_torch_and_cannot_train_in_it() -> None:
    """A run in bf16 evaluates its features in fp32, for which cuDNN has no kernel."""
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    assert torch.equal(BACKENDS["cudnn"](q, k, v), BACKENDS["sdpa"](q, k, v))
    assert "precision=bf16" in str(obstacle("cudnn", CPU, torch.float32, [64]))
