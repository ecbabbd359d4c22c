"""Tests of layer-wise decay: the published values, and the groups of timm and of MAE's code for the same model."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from mimae.optim.layer_decay import groups, layer_of


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Return timm's parameters under our names."""
    ours = {
        name if name.startswith(("head", "fc_norm")) else f"encoder.{name}": p.shape
        for name, p in model.named_parameters()
    }
    return ours


def test_the_published_values_of_vit_base() -> None:
    """MAE's FINETUNE.md has 0.65 for ViT-B; there are 28 groups."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", global_pool="avg")
    rule = groups(1.0, 0.05, 0.65, depth=12)
    found = {name: rule(name, shape) for name, shape in shapes(model).items()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert found[f"encoder.{name}"].peak == pytest.approx(0.003697, abs=1e-6)
    assert found["encoder.blocks.0.attn.qkv.weight"].peak == pytest.approx(0.005688, abs=1e-6)
    assert found["encoder.blocks.11.mlp.fc2.bias"].peak == pytest.approx(0.65)
    assert found["fc_norm.weight"].peak == found["head.weight"].peak == 1.0
    assert len(set(found.values())) == 28
    undecayed = {name for name, group in found.items() if group.weight_decay == 0}
    assert {"encoder.cls_token", "encoder.pos_embed", "head.bias", "fc_norm.weight"} <= undecayed
    assert "encoder.patch_embed.proj.weight" not in undecayed


@pytest.mark.parametrize(("depth", "decay"), [(12, 0.65), (24, 0.75), (32, 0.75)])
def test_every_parameter_is_in_the_group_that_timm_gives_it(depth: int, decay: float) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model("vit_tiny_patch16_224", depth=depth, global_pool="avg")
    theirs: dict[int, tuple[float, float]] = {}
    for group in param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay):
        theirs |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    rule = groups(1.0, 0.05, decay, depth)
    ours = shapes(model)
    assert len(ours) == 8 + 12 * depth
    for (name, shape), parameter in zip(ours.items(), model.parameters(), strict=True):
        group = rule(name, shape)
        assert (group.peak, group.weight_decay) == pytest.approx(theirs[id(parameter)]), name


def test_the_final_norm_learns_with_the_head() -> None:
    """MAE's code gives it the full rate. timm gives it the rate of the last block if the class token is pooled."""
    assert layer_of("encoder.norm.weight", 12) == layer_of("head.weight", 12) == 13
    assert layer_of("encoder.blocks.1.norm1.weight", 12) == 2
    assert layer_of("encoder.blocks.11.norm1.weight", 12) == 12
