"""Tests that the encoder equals timm's ViT, and that weights do not depend on how a model was built."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mimae.model.encoder import Encoder
from mimae.model.settings import ModelSettings
from mimae.randomness import Part, initialise, materialise, parameter_uniform, whole_parts
from tests.kernels.accuracy import assert_as_accurate

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_vit_base_loads_into_timm_and_computes_the_same() -> None:
    """No key is missing or unexpected, there are 85,798,656 parameters, and tokens of a whole image are equal."""
    encoder = Encoder(ModelSettings(size="base"), (224, 224), *IMAGENET)
    initialise(encoder, 0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert isinstance(vit, nn.Module)
    vit.load_state_dict(encoder.state_dict(), strict=True)
    assert sum(p.numel() for p in vit.parameters()) == 85_798_656
    images = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2) / 255 - encoder.mean[:, None, None]) / encoder.std[:, None, None]
    with torch.no_grad():
        ours, theirs = encoder(images)[:, 0], vit.eval().forward_features(pixels)  # type: ignore[operator]
        assert_as_accurate(ours, theirs, vit.double().forward_features(pixels.double()))  # type: ignore[operator]


def test_the_readme_makes_a_vit_of_timm_with_the_features_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """With timm's own pooling, by the class token, on which no loss depends, the features would differ."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(import timm\n.*?)```", readme, re.DOTALL)
    encoder = Encoder(ModelSettings(size="base", depth=1), (224, 224), *IMAGENET)
    initialise(encoder, 0)
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    names: dict[str, Any] = {"mimae": SimpleNamespace(load_encoder=lambda run: encoder.eval()), "images": images}
    with torch.no_grad():
        exec(snippet, names)
        assert (names["features"] - encoder.features(images)).abs().max() < 2e-4


def tiny() -> Encoder:
    return Encoder(ModelSettings(size="tiny", patch_size=4, width=12, depth=1, heads=2), (8, 12), *IMAGENET)


def test_a_model_built_on_the_meta_device_has_the_weights_of_a_whole_one() -> None:
    whole = tiny()
    initialise(whole, 3)
    with torch.device("meta"):
        late = tiny()
    materialise(late, "cpu")
    initialise(late, 3)
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        for (name, got), (_, want) in zip(tensors(late), tensors(whole), strict=True):
            assert torch.equal(got, want), name


def test_a_shard_of_a_weight_is_a_part_of_the_whole() -> None:
    """A rank can fill elements 5 to 12 of a parameter without the other elements."""
    device = torch.device("cpu")
    whole = parameter_uniform(1, "blocks.0.attn.qkv.weight", 0, 20, device)
    assert torch.equal(parameter_uniform(1, "blocks.0.attn.qkv.weight", 5, 8, device), whole[5:13])
    assert not torch.equal(parameter_uniform(1, "blocks.1.attn.qkv.weight", 0, 20, device), whole)


def test_initial_weights_have_the_recipes_spread() -> None:
    """Linear layers and patch projection are Xavier uniform, tokens normal with deviation 0.02, biases zero."""
    encoder = Encoder(ModelSettings(size="tiny", depth=1), (32, 32), *IMAGENET)
    initialise(encoder, 0)
    for name, fan in (("blocks.0.mlp.fc1.weight", 192 + 768), ("patch_embed.proj.weight", 192 + 3 * 16 * 16)):
        weight = encoder.get_parameter(name)
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02
        assert weight.mean().abs() < 0.01 * bound
    assert 0.015 < encoder.cls_token.std() < 0.025
    assert encoder.get_parameter("blocks.0.attn.qkv.bias").abs().max() == 0
    assert torch.equal(encoder.get_parameter("norm.weight"), torch.ones(192))


def test_views_are_independent_sequences_of_their_own_patches() -> None:
    """The tokens of a view do not depend on the patches of other views, nor on the pixels that it hides."""
    encoder = tiny()
    initialise(encoder, 0)
    encoder = encoder.double()  # In fp32 products of different sizes would round differently.
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    visible = torch.tensor([[[0, 5], [1, 2]], [[3, 4], [0, 1]]], dtype=torch.int32)
    tokens = encoder(images, visible)
    assert torch.allclose(encoder(images, visible[:, :1]), tokens[:, :1], rtol=1e-12, atol=1e-12)
    changed = images.clone()
    changed[:, :4, 8:] = 0  # Patch 2 is shown only in the second view of the first image.
    moved = (encoder(changed, visible) - tokens).abs().amax((2, 3)) > 1e-4
    assert moved.tolist() == [[False, True], [False, False]]


def test_the_bias_of_the_patch_projection_may_begin_as_a_convolutions_does() -> None:
    """The bias is uniform in ±1/sqrt(inputs), torch's default, as in MAE's code; other weights do not change.

    A rank that holds a part of the bias gets that part.
    """
    settings = {"size": "tiny", "patch_size": 4, "width": 768, "depth": 1, "heads": 2}
    plain, encoder = (
        Encoder(ModelSettings(**settings, patch_bias=bias), (8, 12), *IMAGENET) for bias in ("zero", "uniform")
    )
    initialise(plain, 0)
    initialise(encoder, 0)
    different = [n for n, p in encoder.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
    assert different == ["patch_embed.proj.bias"] and not plain.get_parameter(different[0]).any()
    bias = encoder.get_parameter(different[0])
    convolution = nn.Conv2d(3, 768, 4)
    assert isinstance(convolution.bias, nn.Parameter)
    for given in (bias, convolution.bias):
        assert 0.99 * 48**-0.5 < given.abs().max() <= 48**-0.5
        assert abs(given.mean()) < 0.1 * 48**-0.5 and abs(given.std() * (3 * 48) ** 0.5 - 1) < 0.05
    parts = whole_parts(encoder)
    parts[different[0]] = Part(torch.empty(100), 300, bias.shape)
    initialise(encoder, 0, parts)
    assert torch.equal(parts[different[0]].values, bias[300:400])


def test_learned_positions_begin_as_the_fixed_ones_and_have_the_gradient_of_timms() -> None:
    settings = ModelSettings(size="tiny", patch_size=4, width=16, depth=2, heads=2)
    fixed, learned = (Encoder(settings, (8, 12), *IMAGENET, learned_positions=each) for each in (False, True))
    for encoder in (fixed, learned):
        initialise(encoder, 0)
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    assert torch.equal(fixed.pos_embed, learned.pos_embed.data)
    assert (fixed(images) - learned(images)).abs().max() < 1e-6
    vit = timm.models.VisionTransformer((8, 12), 4, 3, 0, embed_dim=16, depth=2, num_heads=2).double()
    vit.load_state_dict(learned.state_dict(), strict=True)
    learned.double()
    pixels = (images.permute(0, 3, 1, 2).double() / 255 - learned.mean[:, None, None]) / learned.std[:, None, None]
    vit.forward_features(pixels).pow(3).sum().backward()
    learned(images).pow(3).sum().backward()
    ours, theirs = learned.pos_embed.grad, vit.pos_embed.grad
    assert ours is not None and theirs is not None and theirs.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-8 * theirs.abs().max()
    few = torch.tensor([[[4, 1]], [[0, 5]]], dtype=torch.int32)
    assert (learned(images, few) - fixed.double()(images, few)).abs().max() < 1e-12


def test_paths_that_are_dropped_add_nothing() -> None:
    encoder = tiny()
    initialise(encoder, 0)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    every = torch.ones(2, len(encoder.blocks), 2)
    assert torch.equal(encoder(images, keep=every), encoder(images))
    dropped = every.clone()
    dropped[1] = 0
    tokens = encoder(images, keep=dropped)
    assert torch.equal(tokens[0], encoder(images)[0])
    assert torch.equal(tokens[1], encoder.norm(encoder.embed(images))[1])
