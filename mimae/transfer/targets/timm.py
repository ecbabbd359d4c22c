"""Export as a folder that `timm.create_model("local-dir:...")` opens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from mimae.model.batch_norm import GlobalBatchNorm
from mimae.model.classifier import Classifier
from mimae.model.mimae import MIMAE
from mimae.model.settings import SIZES
from mimae.model.units import Model
from mimae.transfer.targets.base import Exported, Options, Target, need_norm_eps, write_config, write_weights
from mimae.weights.names import to_timm

_GENERIC = "vit_base_patch16_224"


def _write(exported: Exported, options: Options, folder: Path) -> None:
    need_norm_eps(exported, "timm")
    model, data, grid = exported.recipe.model, exported.recipe.data, exported.grid
    ratio = model.mlp / model.width
    if int(model.width * ratio) != model.mlp:  # timm rounds down.
        ratio = (model.mlp + 0.5) / model.width
    head = _head(exported.model)
    config = {
        "architecture": _architecture(exported),
        "num_classes": head.classes,
        "num_features": model.width,
        "global_pool": head.pool,
        **({"label_names": list(exported.classes)} if exported.classes else {}),
        # timm reads the pooling here alone.
        "model_args": {
            "img_size": list(grid.size_hw),
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": ratio,
            "num_classes": head.classes,
            "global_pool": head.pool,
            "fc_norm": head.has_norm,
        },
        "pretrained_cfg": {
            "input_size": [3, *grid.size_hw],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": "bicubic",
            "crop_pct": exported.recipe.evaluation.crop if exported.classes else 1.0,
            "crop_mode": "center",
            "num_classes": head.classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "mimae": exported.description(),
    }
    write_config(folder, config)
    write_weights(folder, to_timm(exported.state()) | head.weights, options.dtype)


class _Head(NamedTuple):
    """Layers of timm's model after the encoder."""

    classes: int
    pool: str
    has_norm: bool
    """A norm of its own behind the pooling, in place of the encoder's."""
    weights: dict[str, Tensor]


def _head(model: Model) -> _Head:
    """Return the pooling alone, or a classifier. A batch norm becomes part of the linear layer behind it."""
    if not isinstance(model, Classifier):
        # With its own fc_norm the final norm would be lost.
        return _Head(0, "avg", False, {})
    pool = {"mean": "avg", "class_token": "token"}[model.pooling]
    weight, bias, norm = model.head.weight.data, model.head.bias.data, model.fc_norm
    weights = dict[str, Tensor]()
    if isinstance(norm, GlobalBatchNorm):
        scale = norm.scale()
        weight, bias = weight * scale, bias - weight @ (scale * norm.mean)
    elif isinstance(norm, nn.LayerNorm):
        weights = {"fc_norm.weight": norm.weight, "fc_norm.bias": norm.bias}
    weights |= {"head.weight": weight, "head.bias": bias}
    return _Head(len(bias), pool, isinstance(norm, nn.LayerNorm), weights)


def _architecture(exported: Exported) -> str:
    """Return the name of timm's model of this size. The sizes in model_args override it in any case."""
    model = exported.recipe.model
    for size, numbers in SIZES.items():
        if all(getattr(model, key) == value for key, value in numbers.items() if key != "mlp_width"):
            return f"vit_{size}_patch{model.patch_size}_224"
    return _GENERIC


TARGET = Target(
    title="timm",
    write=_write,
    check=lambda exported, options: "timm_classifier" if exported.classes else "timm",
    loading="""import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()
found = model(pixels)  # pixels (B, 3, H, W), normalised -> features, or the logits of a classifier
tokens = model.forward_features(pixels)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for images of Pillow""",
    models=(MIMAE, Classifier),
    modules=("timm",),
)
