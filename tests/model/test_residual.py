"""Tests of the residual stream: its dtype, its rounding, and that the default is as it was without the setting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.errors import UserError
from mimae.model.blocks import Block, Norm
from mimae.model.masking import views
from mimae.model.mimae import MIMAE, build
from tests.plan.test_plan import SMALL

WIDTH, HALF_ULP = 48, 2.0**-8
"""Largest relative error of rounding to bf16, which has 8 significant bits."""


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(SMALL, ["precision=bf16", *overrides]).recipe


def passed(recipe: Recipe, *, autocast: bool = True) -> tuple[MIMAE, Tensor, list[tuple[torch.dtype, ...]]]:
    """Return the model after a backward, its loss, and the dtypes of tokens and result of every block."""
    model = build(recipe)
    seen: list[tuple[torch.dtype, ...]] = []
    for block in model.units():
        block.register_forward_hook(
            lambda _, given, out: seen.append((*(x.dtype for x in given if x is not None), out.dtype))
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, *recipe.data.size_hw, 3), dtype=torch.uint8, generator=generator)
    visible, targets = views(recipe, 0, 0, torch.arange(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(images, visible, targets).loss
    loss.backward()
    return model, loss, seen


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_the_stream_has_the_dtype_of_the_setting(attention: str, residual: str) -> None:
    recipe = recipe_of(f"model.residual={residual}", f"decoder.attention={attention}")
    model, loss, seen = passed(recipe)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[residual]
    assert len(seen) == len(model.units()) and {each for dtypes in seen for each in dtypes} == {dtype}
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    # The maps of the encoder, which other heads take, stay fp32.
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        (maps,) = model.encoder.maps(torch.zeros(1, *recipe.data.size_hw, 3, dtype=torch.uint8), [-1])
    assert {each for dtypes in seen for each in dtypes} == {dtype} and maps.dtype == torch.float32


def test_without_autocast_the_setting_changes_no_bit() -> None:
    """So the features of a run do not depend on it, nor do its exports."""
    (_, expected, _), (_, found, seen) = (
        passed(recipe_of(f"model.residual={residual}"), autocast=False) for residual in ("fp32", "bf16")
    )
    assert torch.equal(expected, found) and {each for dtypes in seen for each in dtypes} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_with_a_stream_in_fp32_the_norms_are_those_of_torch(autocast: bool) -> None:
    torch.manual_seed(0)
    block, tokens = Block(WIDTH, 4, "sdpa"), torch.randn(3, 7, WIDTH)
    results = []
    for kind in (Norm, nn.LayerNorm):
        for name in ("norm1", "norm2"):
            norm = kind(WIDTH, eps=1e-6)
            norm.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, norm)
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(tokens)
        out.sum().backward()
        results.append([out, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_norm_of_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    norm, exact = Norm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        exact.load_state_dict(norm.state_dict())
    tokens = (torch.randn(50, WIDTH) + 3).bfloat16().requires_grad_()
    double, slope = tokens.detach().double().requires_grad_(), torch.randn(50, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(tokens)
    found.backward(slope)
    expected = exact(double)
    expected.backward(slope.double())
    assert found.dtype == torch.bfloat16
    # fp32's own errors are a thousandth of this rounding.
    slack = 1e-3 * HALF_ULP
    for got, want in ((found, expected), (tokens.grad, double.grad)):
        assert got is not None and want is not None
        assert ((got - want).abs() <= HALF_ULP * want.abs() * (1 + 1e-2) + slack).all()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
    # A sum in bf16 would be off by more than a hundredth.
    torch.testing.assert_close(norm.weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.bias.grad.double(), exact.bias.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


def test_the_stream_adds_errors_of_the_size_of_those_of_the_products() -> None:
    """Both round each number a few times in a block. A stream that lost its gradient would have an error near 1."""

    def gradient(recipe: Recipe, autocast: bool) -> Tensor:
        model, _, _ = passed(recipe, autocast=autocast)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(recipe_of(), autocast=False)
    errors = {
        residual: torch.dist(gradient(recipe_of(f"model.residual={residual}"), autocast=True), exact) / exact.norm()
        for residual in ("fp32", "bf16")
    }
    assert 0 < errors["fp32"] < errors["bf16"] < 4 * errors["fp32"]


def test_a_stream_is_not_less_precise_than_the_products() -> None:
    told = r"model\.residual = bf16 .*: the residual stream cannot be less precise .* legal is model\.residual=fp32"
    with pytest.raises(UserError, match=told):
        load_recipe(SMALL, ["precision=fp32", "model.residual=bf16"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_norm_keeps_the_rounded_tokens_and_no_copy_of_them(device: str) -> None:
    norm, tokens = Norm(WIDTH).to(device), torch.randn(5, WIDTH, device=device).bfloat16().requires_grad_()
    kept: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.extend([tensor.dtype] * (tensor.shape == tokens.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast(device, torch.bfloat16):
        norm(tokens)
    assert kept == [torch.bfloat16]


@pytest.mark.slow  # compiles a block
def test_a_compiled_block_computes_the_same() -> None:
    """The compiler rounds fewer intermediate results, so the difference is that of a few roundings to bf16."""
    torch.manual_seed(0)
    block, tokens = Block(WIDTH, 3, "sdpa"), torch.randn(8, 50, WIDTH).bfloat16()

    def run() -> list[Tensor]:
        block.zero_grad()
        given = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = block(given)
        out.square().mean().backward()
        assert out.dtype == torch.bfloat16 and given.grad is not None
        return [out, given.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]

    expected = run()
    block.compile(dynamic=False, fullgraph=True)
    for got, want in zip(run(), expected, strict=True):
        assert torch.dist(got.float(), want.float()) <= 8 * HALF_ULP * want.float().norm() + 1e-6
