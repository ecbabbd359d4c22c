"""Masked autoencoders of other packages, transformers and lightly, with the weights of a MIMAE (N=1).

Both packages are optional at run time: a missing one raises UserError. Each model takes float images (B, 3, H, W),
normalised by channel, and noise (B, L) whose order gives the mask, as in MAE, and returns the reconstruction loss.
"""

from __future__ import annotations

import re
import warnings
from importlib import import_module
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimae.config.recipe import Recipe
from mimae.errors import UserError
from mimae.model.geometry import geometry

State = dict[str, Tensor]


class TransformersMAE(nn.Module):
    """`transformers.ViTMAEForPreTraining`, made from a configuration, with fused attention."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        transformers = _optional("transformers", "transformers")
        side, sizes = _square(recipe), geometry(recipe)
        model, decoder = recipe.model, recipe.decoder
        self.mae = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                hidden_size=model.width,
                num_hidden_layers=model.depth,
                num_attention_heads=model.heads,
                intermediate_size=4 * model.width,
                layer_norm_eps=1e-6,
                image_size=side,
                patch_size=model.patch_size,
                decoder_hidden_size=decoder.width,
                decoder_num_hidden_layers=decoder.depth,
                decoder_num_attention_heads=decoder.heads,
                decoder_intermediate_size=4 * decoder.width,
                # It keeps int(L (1 - ratio)) patches. With half a patch more, rounding gives our number.
                mask_ratio=1 - (sizes.visible + 0.5) / sizes.grid.patches,
                norm_pix_loss=recipe.objective.normalize_pixels,
                attn_implementation="sdpa",
            )
        )
        # transformers 5 leaves the positions of a model made from a configuration at zero; call its initialisers.
        embeddings = self.mae.vit.embeddings
        embeddings.patch_embeddings.projection._is_hf_initialized = False
        embeddings.initialize_weights()
        self.mae.decoder.initialize_weights(sizes.grid.patches)

    @property
    def blocks(self) -> Any:
        return self.mae.vit.layers

    @property
    def decoder_blocks(self) -> Any:
        return self.mae.decoder.decoder_layers

    def set_attention(self, fused: bool) -> None:
        """Choose torch's fused attention, or two products and a softmax."""
        self.mae.set_attn_implementation("sdpa" if fused else "eager")

    def load(self, state: State) -> None:
        """Take the weights of a `MIMAE.state_dict()`."""
        taken = {name: value for ours, tensor in state.items() for name, value in _to_transformers(ours, tensor)}
        _load(self.mae, taken, keep=("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.mae(pixel_values=images, noise=noise).loss


class LightlyMAE(nn.Module):
    """lightly's MAE, assembled as in its example, with the recipe's targets."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        modules = _optional("lightly.models.modules", "lightly")
        self.utils: Any = _optional("lightly.models.utils", "lightly")
        side, sizes = _square(recipe), geometry(recipe)
        model, decoder = recipe.model, recipe.decoder
        self.patch_size = model.patch_size
        self.num_visible = sizes.visible
        self.normalize = recipe.objective.normalize_pixels
        self.backbone = modules.MaskedVisionTransformerTIMM(
            VisionTransformer(
                img_size=side,
                patch_size=model.patch_size,
                embed_dim=model.width,
                depth=model.depth,
                num_heads=model.heads,
                num_classes=0,
            )
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # This class is deprecated in favour of one without embedding and head.
            self.decoder = modules.MAEDecoderTIMM(
                num_patches=sizes.grid.patches,
                patch_size=model.patch_size,
                embed_dim=model.width,
                decoder_embed_dim=decoder.width,
                decoder_depth=decoder.depth,
                decoder_num_heads=decoder.heads,
            )
        # It belongs to masked image modelling without a gather. MAE does not use it, and it would have no gradient.
        self.backbone.mask_token.requires_grad_(False)

    @property
    def blocks(self) -> Any:
        return self.backbone.vit.blocks

    @property
    def decoder_blocks(self) -> Any:
        return self.decoder.decoder_blocks

    def set_attention(self, fused: bool) -> None:
        """Choose torch's fused attention, or two products and a softmax."""
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn.fused_attn = fused

    def load(self, state: State) -> None:
        """Take the weights of a `MIMAE.state_dict()`."""
        taken = {_to_lightly(name): tensor for name, tensor in state.items() if not name.startswith("objective.")}
        _load(self, taken, keep=("backbone.vit.pos_embed", "backbone.mask_token", "decoder.decoder_pos_embed"))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        utils = self.utils
        order = 1 + torch.argsort(noise, dim=1)
        class_token = torch.zeros_like(order[:, :1])
        idx_keep = torch.cat([class_token, order[:, : self.num_visible]], dim=1)
        idx_mask = order[:, self.num_visible :]
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=idx_keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (images.shape[0], self.backbone.sequence_length))
        tokens = utils.set_at_index(tokens, idx_keep, encoded.type_as(tokens))
        decoded = self.decoder.decode(tokens)
        prediction = self.decoder.predict(utils.get_at_index(decoded, idx_mask))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), idx_mask - 1)
        if self.normalize:
            target = utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(prediction.to(target.dtype), target)


def noise_of(visible: Tensor, num_patches: int) -> Tensor:
    """Return noise (B, L) whose argsort lists the patches of `visible` (B, N, K), view by view, then the rest."""
    order = visible.flatten(1).long()
    noise = torch.full((order.shape[0], num_patches), 2.0, device=visible.device)
    return noise.scatter(1, order, torch.linspace(0, 1, order.shape[1], device=visible.device).expand(order.shape))


def _optional(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"the comparison with {package} needs it ({error}): install it with `pip install {package}`, "
            "or omit --peers"
        ) from error


def _load(module: nn.Module, weights: State, keep: tuple[str, ...]) -> None:
    """Load weights strictly, except for buffers that the module computes itself: it keeps its tables of positions."""
    own = module.state_dict()
    try:
        module.load_state_dict({**weights, **{name: own[name] for name in keep}})
    except (RuntimeError, KeyError) as error:
        raise UserError(
            "the installed transformers or lightly names its weights differently from the versions of this "
            f"comparison (transformers 5.23, lightly 1.6): {error}"
        ) from error


def _square(recipe: Recipe) -> int:
    """Return the side of the image in pixels. Raises UserError if images are not square."""
    height, width = recipe.data.size_hw
    if height != width:
        raise UserError(f"transformers and lightly need square images, and data.image_size is [{height}, {width}]")
    return height


_RENAMED = [
    (r"^encoder\.patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^encoder\.cls_token$", "vit.embeddings.cls_token"),
    (r"^encoder\.pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^encoder\.blocks\.", "vit.layers."),
    (r"^encoder\.norm\.", "vit.layernorm."),
    (r"^decoder\.embed\.", "decoder.decoder_embed."),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"^decoder\.norm\.", "decoder.decoder_norm."),
    (r"^decoder\.head\.", "decoder.decoder_pred."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
]


def _to_transformers(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Yield one of our tensors under the names of `transformers`, which has separate query, key and value weights."""
    if name.startswith("objective."):
        return []
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    if ".qkv." in name:
        return [(name.replace(".qkv.", f".{part}_proj."), t) for part, t in zip("qkv", tensor.chunk(3))]
    return [(name, tensor)]


def _to_lightly(name: str) -> str:
    name = re.sub(r"^encoder\.", "backbone.vit.", name)
    name = re.sub(r"^decoder\.(embed|blocks|norm)\.", r"decoder.decoder_\1.", name)
    return name.replace("decoder.head.", "decoder.decoder_pred.")
