"""Tests of the heads: the shapes of their levels, and UperNet against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimae.model.encoder import Encoder
from mimae.model.settings import ModelSettings
from mimae.randomness import initialise, materialise
from mimae.segmentation.heads import Linear, Pyramid, UperNet
from mimae.segmentation.segmenter import Segmenter
from mimae.segmentation.settings import SegmentSettings

SIZE = ModelSettings(size="tiny", patch_size=4, width=32, depth=4, heads=2)


def segmenter(**keys: Any) -> Segmenter:
    with torch.device("meta"):
        encoder = Encoder(SIZE, (24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), learned_positions=True)
        model = Segmenter(encoder, SegmentSettings(**{"classes": 5, "width": 16, **keys}))
    materialise(model, "cpu")
    initialise(model, 0)
    return model


def maps(width: int = 32, sizes: tuple[tuple[int, int], ...] = ((6, 8),) * 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, width, *size, generator=generator) for size in sizes]


def test_the_levels_have_the_strides_of_the_published_neck() -> None:
    """The strides are 4, 8, 16 and 32 for patches of 16 pixels. An odd number of patches is rounded up."""
    pyramid = Pyramid(32)
    assert [tuple(level.shape[2:]) for level in pyramid(maps())] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert pyramid(maps(sizes=((5, 7),) * 4))[3].shape[2:] == (3, 4)


def test_the_whole_model_gives_each_pixel_its_logits() -> None:
    images = torch.randint(0, 256, (2, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes = torch.zeros(2, 24, 32, dtype=torch.int16)
    classes[:, :, 16:] = -1
    for keys, names in (({}, ["main", "auxiliary"]), ({"auxiliary": 0.0}, ["main"]), ({"head": "linear"}, ["main"])):
        model = segmenter(**keys)
        logits = model.logits(images)
        assert logits.shape == (2, 5, 24, 32)
        losses = model(images, classes)
        assert list(losses) == names
        expected = nn.functional.cross_entropy(logits[..., :16], classes[..., :16].long(), reduction="sum")
        torch.testing.assert_close(losses["main"], expected / classes.numel())
        sum(losses.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for p in model.parameters()), "engines expect a gradient of every parameter"


def test_relative_positions_are_beits_and_begin_at_nothing() -> None:
    beit = pytest.importorskip("timm.models.beit", reason="timm is the oracle")
    images = torch.randint(0, 256, (1, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = segmenter(relative_positions=True)
    assert torch.allclose(model.logits(images), segmenter().logits(images), atol=1e-5)
    attention: Any = model.encoder.blocks[0].attn
    nn.init.normal_(attention.rel_pos)
    index = beit.gen_relative_position_index((6, 8))
    assert torch.equal(attention.bias(), attention.rel_pos[index].permute(2, 0, 1))
    assert not torch.allclose(model.logits(images), segmenter().logits(images), atol=1e-3)
    sum(model(images, torch.zeros(1, 24, 32, dtype=torch.int16)).values()).backward()
    assert all(p.grad is not None for p in model.parameters()), "engines expect a gradient of every parameter"


def test_a_batch_without_a_judged_pixel_has_loss_0() -> None:
    images, nothing = torch.zeros(1, 24, 32, 3, dtype=torch.uint8), torch.full((1, 24, 32), -1)
    assert segmenter()(images, nothing)["main"] == 0


def test_dropped_channels_do_not_matter() -> None:
    head = UperNet(32, 16, 5)
    keep = torch.ones(2, 16)
    keep[:, 3] = 0
    whole = head(maps(), keep)
    with torch.no_grad():
        head.classes.weight[:, 3] = 7
    torch.testing.assert_close(head(maps(), keep), whole)


def test_the_linear_head_is_one_layer_on_normed_maps() -> None:
    head, each = Linear(32, 5), maps()
    tokens = torch.cat([nn.functional.layer_norm(one.permute(0, 2, 3, 1), (32,), eps=1e-6) for one in each], -1)
    expected = nn.functional.linear(tokens, head.classes.weight.flatten(1), head.classes.bias)
    torch.testing.assert_close(head(each), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


def test_upernet_computes_what_transformers_does_but_for_the_norms() -> None:
    """The norms are removed from both, because transformers has batch norms and ours are group norms."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    levels = maps(sizes=((24, 32), (12, 16), (6, 8), (3, 4)))
    ours = UperNet(32, 16, 5)
    config = transformers.UperNetConfig(hidden_size=16, pool_scales=[1, 2, 3, 6], num_labels=5)
    theirs = UperNetHead(config, in_channels=[32] * 4)
    for module in (ours, theirs):
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.GroupNorm | nn.BatchNorm2d):
                    setattr(parent, name, nn.Identity())
    order = [
        *(f"pools.{i}.0.weight" for i in range(4)),
        "pooled.0.weight",
        *(f"laterals.{i}.0.weight" for i in range(3)),
        *(f"smooth.{i}.0.weight" for i in range(3)),
        "fused.0.weight",
        "classes.weight",
        "classes.bias",
    ]
    names = [
        *(f"psp_modules.{i}.1.conv.weight" for i in range(4)),
        "bottleneck.conv.weight",
        *(f"lateral_convs.{i}.conv.weight" for i in range(3)),
        *(f"fpn_convs.{i}.conv.weight" for i in range(3)),
        "fpn_bottleneck.conv.weight",
        "classifier.weight",
        "classifier.bias",
    ]
    state = ours.state_dict()
    theirs.load_state_dict({name: state[key] for name, key in zip(names, order, strict=True)})
    assert set(order) == set(state)
    torch.testing.assert_close(ours(levels), theirs(levels), atol=1e-5, rtol=1e-5)
