"""Tests of weight names: our tensors under the names of other libraries and back, loaded by their own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimae.data.settings import DataSettings
from mimae.model.mimae import MIMAE
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.objective.settings import ObjectiveSettings
from mimae.weights.names import Place, place, sort, to_mae, to_timm, to_transformers

SIDE, PATCH, WIDTH, DEPTH, HEADS = 16, 4, 24, 2, 3
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = (
    16,
    1,
    2,
)  # differ from the encoder's, so that a misplaced tensor fails

# Names of facebookresearch/mae, models_mae.py, with one block in encoder and decoder.
MAE = [
    *("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"),
    *("patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"),
    *("decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight", "decoder_norm.bias"),
    *("decoder_pred.weight", "decoder_pred.bias"),
    *(
        f"{blocks}.0.{inner}.{leaf}"
        for blocks in ("blocks", "decoder_blocks")
        for inner in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ),
]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Return weights of encoder and decoder in which all numbers differ, with the decoder's positions."""
    model = MIMAE(
        DataSettings(image_size=SIDE),
        MaskingSettings(num_masks=1),
        ModelSettings(patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS),
        DecoderSettings(width=DECODER_WIDTH, depth=DECODER_DEPTH, heads=DECODER_HEADS),
        ObjectiveSettings(max_mi=0, min_mi=0),
    )
    generator = torch.Generator().manual_seed(0)
    names = [name for name in model.state_dict() if not name.startswith("objective.")]
    found = {name: torch.randn(model.state_dict()[name].shape, generator=generator) for name in names}
    return found | {"decoder.pos_embed": model.decoder.pos_embed.clone()}


def encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}


def back(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors, converted from those of another project."""
    found = sort(theirs)
    assert not found.left
    return {ours: torch.cat([theirs[name] for name in names]) for ours, names in found.placed.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_timm_loads_the_encoder(state: dict[str, Tensor]) -> None:
    vit = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0
    )
    vit.load_state_dict(to_timm(encoder(state)), strict=True)
    assert_equal(back(vit.state_dict()), encoder(state))


def test_the_names_of_mae(state: dict[str, Tensor]) -> None:
    one = {name: tensor for name, tensor in state.items() if "blocks.1." not in name}
    assert set(to_mae(one)) == set(MAE)
    assert_equal(back(to_mae(state)), state)


def test_transformers_loads_encoder_and_decoder_and_all_its_spellings_are_read(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    config = transformers.ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_WIDTH,
    )
    config.save_pretrained(tmp_path)
    hub = {name: tensor.contiguous() for name, tensor in to_transformers(state).items()}
    assert_equal(back(hub), state)
    save_file(hub, tmp_path / "model.safetensors", {"format": "pt"})

    model, told = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    in_memory = model.state_dict()
    assert any(".q_proj." in name for name in in_memory)
    assert_equal(back(in_memory), state)

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert any("decoder_encoder" in name for name in saved), "version 5 has given up the third spelling"
    assert_equal(back(saved), state)


def test_transformers_loads_the_encoder_alone(state: dict[str, Tensor], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config.save_pretrained(tmp_path)
    hub = {name: tensor.contiguous() for name, tensor in to_transformers(encoder(state)).items()}
    save_file(hub, tmp_path / "model.safetensors", {"format": "pt"})
    model, told = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert_equal(back(model.state_dict()), encoder(state))


@pytest.mark.parametrize("name", ["objective.gate.weight", "encoder.blocks.0.ls1.gamma", "norm.weight"])
def test_what_is_not_ours_is_not_written(name: str) -> None:
    for to in (to_timm, to_mae, to_transformers):
        with pytest.raises(ValueError, match=name):
            to({name: torch.zeros(1)})


def test_timm_has_no_decoder() -> None:
    with pytest.raises(ValueError, match=r"timm's ViT has no decoder\.mask_token"):
        to_timm({"decoder.mask_token": torch.zeros(1)})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("module.blocks.3.mlp.fc1.bias", Place("encoder.blocks.3.mlp.fc1.bias")),
        ("model.encoder.blocks.3.mlp.fc1.bias", Place("encoder.blocks.3.mlp.fc1.bias")),
        ("encoder.layer.11.output.dense.bias", Place("encoder.blocks.11.mlp.fc2.bias")),
        ("decoder.decoder_layers.1.attention.k_proj.weight", Place("decoder.blocks.1.attn.qkv.weight", 1)),
    ],
)
def test_where_a_tensor_goes(theirs: str, ours: Place) -> None:
    assert place(theirs) == ours


@pytest.mark.parametrize(
    "name",
    ["head.weight", "fc_norm.weight", "pooler.dense.bias", "blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight"],
)
def test_what_has_no_place_is_left_over(name: str) -> None:
    found = sort([name, "cls_token"])
    assert found.left == (name,)


def test_two_for_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm\.bias and layernorm\.bias are both encoder\.norm\.bias"):
        sort(["norm.bias", "layernorm.bias"])


def test_queries_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is there without the rest of encoder\.blocks\.0\.attn\.qkv\.bias"):
        sort(["layers.0.attention.q_proj.bias", "layers.0.attention.v_proj.bias"])
