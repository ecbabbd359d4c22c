"""Export as a file in the layout of facebookresearch's MAE: `torch.load(...)["model"]`."""

from __future__ import annotations

from pathlib import Path

import torch

from mimae.transfer.targets.base import Exported, Options, Target, need_mae, need_norm_eps, need_square, write_config
from mimae.weights.names import to_mae


def _write(exported: Exported, options: Options, folder: Path) -> None:
    need_norm_eps(exported, "facebookresearch's MAE")
    need_square(exported, "facebookresearch's MAE")
    if options.decoder:
        need_mae(exported, "facebookresearch's MAE")
    state = to_mae(exported.state(options.decoder))
    tensors = {name: tensor.detach().to(options.dtype).contiguous() for name, tensor in state.items()}
    torch.save({"model": tensors}, folder / "model.pth")
    decoder = exported.recipe.decoder
    sizes = {"decoder_embed_dim": decoder.width, "decoder_depth": decoder.depth, "decoder_num_heads": decoder.heads}
    write_config(
        folder,
        {
            "mimae": exported.description(),
            **(sizes | {"norm_pix_loss": exported.recipe.objective.normalize_pixels} if options.decoder else {}),
        },
    )


TARGET = Target(
    title="the code of facebookresearch/mae",
    write=_write,
    check=lambda exported, options: "mae",
    loading="""import torch

weights = torch.load("DIR/model.pth", weights_only=True)["model"]
# for a VisionTransformer of its models_vit.py, or with the decoder for a MaskedAutoencoderViT of models_mae.py:
model.load_state_dict(weights, strict=False)""",
    has_decoder=True,
)
