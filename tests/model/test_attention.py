"""Every backend of attention that runs here is softmax(q k^T / sqrt(d)) v; of the others the reason is told."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mimae.model.attention import BACKENDS, obstacle

CPU = torch.device("cpu")
# An odd number of heads; more tokens that are asked than ask; 50 tokens are an encoder's view at ViT-B.
SHAPES = {"q": (2, 3, 7, 16), "k": (2, 3, 50, 16), "v": (2, 3, 50, 16)}


def inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Scores of deviation 3, so that a softmax over the wrong axis or a lost 1/sqrt(d) does not hide.
    return [(torch.randn(shape, generator=generator) * 3**0.5).to(device, dtype) for shape in SHAPES.values()]


def off(v: Tensor) -> float:
    """How far rounding may move attention's output in fp32, a mean of the values: scores of up to 12 are sums of 16
    terms, and torch's exp may be off by 20 of its last bits, so a weight is by 64 at most."""
    return 64 * torch.finfo(torch.float32).eps * v.abs().max().item()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.exp(q @ k.transpose(-1, -2) / 4)
    return scores / scores.sum(-1, keepdim=True) @ v


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
def test_forward(backend: str) -> None:
    q, k, v = inputs(torch.float32, CPU)
    expected = plain(q.double(), k.double(), v.double())
    assert (BACKENDS[backend](q, k, v) - expected).abs().max() < off(v)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_gradients(backend: str) -> None:
    qkv = [x.requires_grad_() for x in inputs(torch.float64, CPU)]
    weights = torch.randn(SHAPES["q"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((BACKENDS[backend](*qkv) * weights).sum(), qkv)
    expected = torch.autograd.grad((plain(*qkv) * weights).sum(), qkv)
    assert all(torch.dist(a, b) < 1e-12 * b.norm() for a, b in zip(found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu_against_the_plain_form(backend: str) -> None:
    """Twice the error of the plain form in the same dtype, and a little."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    reason = obstacle(backend, device, dtype, [16])
    if reason is not None:
        pytest.skip(reason)
    exact = [x.double().requires_grad_() for x in inputs(dtype, device)]
    truth = [plain(*exact)]
    weights = torch.randn_like(truth[0])
    truth += torch.autograd.grad((truth[0] * weights).sum(), exact)

    def errors(function: object) -> list[float]:
        qkv = [x.requires_grad_() for x in inputs(dtype, device)]
        found = [function(*qkv)]  # type: ignore[operator]
        found += torch.autograd.grad((found[0] * weights).sum(), qkv)
        return [(torch.dist(a.double(), b) / b.norm()).item() for a, b in zip(found, truth)]

    assert all(ours <= 2 * theirs + 1e-3 for ours, theirs in zip(errors(BACKENDS[backend]), errors(plain)))


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle("sdpa", CPU, torch.bfloat16, [8, 32]) is None
    assert "does not support backward on CPU" in str(obstacle("flex", CPU, torch.float32, [32]))
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert str(obstacle("xformers", CPU, torch.float32, [32])).startswith("ModuleNotFoundError: ")


def test_an_operator_that_is_missing_for_one_width_of_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for xformers that computes heads of 32 alone, in its own layout: tokens before heads."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] != 32:
            raise NotImplementedError(f"No operator found for heads of {q.shape[-1]}\nand a long list")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return plain(q * 4 / 32**0.5, k, v).transpose(1, 2)

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
