"""Export as a folder that `timm.create_model("local-dir:...")` opens."""

from __future__ import annotations

from pathlib import Path

from mimae.model.settings import SIZES
from mimae.transfer.targets.base import Exported, Options, Target, need_norm_eps, write_config, write_weights
from mimae.weights.names import to_timm

_GENERIC = "vit_base_patch16_224"


def _write(exported: Exported, options: Options, folder: Path) -> None:
    need_norm_eps(exported, "timm")
    model, data, grid = exported.recipe.model, exported.recipe.data, exported.grid
    ratio = model.mlp / model.width
    if int(model.width * ratio) != model.mlp:  # timm rounds down.
        ratio = (model.mlp + 0.5) / model.width
    config = {
        "architecture": _architecture(exported),
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "avg",
        # timm reads the pooling only here. With timm's fc_norm the final norm would be lost.
        "model_args": {
            "img_size": list(grid.size_hw),
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": ratio,
            "num_classes": 0,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, *grid.size_hw],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "mimae": exported.description(),
    }
    write_config(folder, config)
    write_weights(folder, to_timm(exported.state()), options.dtype)


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
    check=lambda options: "timm",
    loading="""import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()
features = model(pixels)  # pixels (B, 3, H, W), normalised; model.forward_features(pixels) gives the tokens
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for images of Pillow""",
    modules=("timm",),
)
