"""Export as a folder that transformers opens: a ViTModel, or with the decoder a ViTMAEForPreTraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimae.transfer.targets.base import (
    Exported,
    Options,
    Target,
    need_mae,
    need_square,
    preprocessor,
    write_config,
    write_weights,
)
from mimae.weights.names import to_transformers


def _write(exported: Exported, options: Options, folder: Path) -> None:
    model, decoder, grid = exported.recipe.model, exported.recipe.decoder, exported.grid
    height, width = grid.size_hw
    config: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if options.decoder else "ViTModel"],
        "model_type": "vit_mae" if options.decoder else "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": model.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": str(options.dtype).removeprefix("torch."),
        "mimae": exported.description(),
    }
    if options.decoder:
        need_mae(exported, "ViTMAEForPreTraining")
        need_square(exported, "ViTMAEForPreTraining")
        config |= {
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": 4 * decoder.width,
            "mask_ratio": exported.recipe.masking.ratio,
            "norm_pix_loss": exported.recipe.objective.normalize_pixels,
        }
    write_config(folder, config)
    write_config(folder, preprocessor(exported), "preprocessor_config.json")
    write_weights(folder, to_transformers(exported.state(options.decoder)), options.dtype)


TARGET = Target(
    title="transformers",
    write=_write,
    check=lambda exported, options: "transformers_mae" if options.decoder else "transformers",
    loading="""from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("DIR", add_pooling_layer=False).eval()  # the folder has no weights for its pooler
pixels = AutoImageProcessor.from_pretrained("DIR")(images, return_tensors="pt")
features = model(**pixels).last_hidden_state[:, 1:].mean(1)""",
    has_decoder=True,
    modules=("transformers",),
)
