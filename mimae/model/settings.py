"""Settings of the masks, the encoder and the decoder."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from mimae.config.section import PATH, Section, setting

SIZES = {
    "tiny": {"patch_size": 16, "width": 192, "depth": 12, "heads": 3},
    "small": {"patch_size": 16, "width": 384, "depth": 12, "heads": 6},
    "base": {"patch_size": 16, "width": 768, "depth": 12, "heads": 12},
    "large": {"patch_size": 16, "width": 1024, "depth": 24, "heads": 16},
    "huge": {"patch_size": 14, "width": 1280, "depth": 32, "heads": 16},
    "giant": {"patch_size": 14, "width": 1408, "depth": 40, "heads": 16, "mlp_width": 6144},
    "gigantic": {"patch_size": 14, "width": 1664, "depth": 48, "heads": 16, "mlp_width": 8192},
}


class MaskKind(NamedTuple):
    """Properties of a mask kind that the checks of settings need. `masking.DRAWS` has the functions that draw masks."""

    is_disjoint: bool
    """True if the views of an image share no patch. N K must then be at most L."""


MASK_KINDS = {"orthogonal": MaskKind(is_disjoint=True), "independent": MaskKind(is_disjoint=False)}
"""Every legal value of masking.kind."""

Predict = Literal["hidden", "next_view"]
"""Which patches each view's decoder predicts, see `targets`."""

PatchBias = Literal["zero", "uniform"]

Checkpointing = Literal["none", "selective", "full"]

Residual = Literal["fp32", "bf16"]


class MaskingSettings(Section):
    """The number of views per image, and the patches that each of them shows."""

    kind: Literal["orthogonal", "independent"] = Field(
        "orthogonal",
        description="orthogonal: the views of an image share no patch; independent: each view is drawn by itself",
    )
    num_masks: int = Field(4, ge=1, le=64, description="views per image, N")
    ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that a view hides")
    rounding: Literal["nearest", "down"] = Field(
        "nearest", description="rounding of the number of patches that a view shows; down: as in MAE's code"
    )

    def num_visible(self, num_patches: int) -> int:
        """Return K, the number of patches that a view shows: L (1 - ratio), rounded by `rounding`, from 1 to L - 1."""
        shown = num_patches * (1 - self.ratio)
        return min(max(int(shown) if self.rounding == "down" else round(shown), 1), num_patches - 1)


class ModelSettings(Section):
    """The encoder. `size` sets the numbers below it; a number that is set itself overrides `size`."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"] = Field(
        "base", description="named ViT size"
    )
    patch_size: int = Field(16, ge=1, description="side of a patch in pixels (default: the size's)")
    width: int = Field(768, ge=4, description="encoder width (default: the size's)")
    depth: int = Field(12, ge=1, le=1000, description="encoder blocks (default: the size's)")
    heads: int = Field(12, ge=1, description="attention heads (default: the size's)")
    mlp_width: int | None = Field(
        None, ge=1, description="hidden width of an encoder block's MLP (default: the size's); null: 4 x width"
    )
    attention: Literal["auto", "sdpa", "plain", "cudnn", "xformers", "flex"] = setting(
        "auto",
        resume="rounding",
        description="backend of attention in encoder and decoder; sdpa: torch's own choice; plain: two matrix products "
        "and a softmax; auto: the fastest one, as measured when a run starts",
    )
    residual: Residual = Field(
        "fp32",
        description="precision of the tokens that each block adds to, in encoder and decoder (the residual stream); "
        "bf16: also the norms of the blocks read and write bf16, with fp32 sums; needs precision=bf16",
    )
    patch_bias: PatchBias = Field(
        "zero",
        description="initial values of the bias of the patch projection; uniform: in ±1/sqrt(3 P^2), where P is the "
        "side of a patch, as in MAE's code",
    )
    norm_eps: float = Field(
        1e-6, gt=0, description="epsilon of every LayerNorm, in the decoder too; transformers' own default is 1e-12"
    )
    init: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=PATH,
        description="source of the start weights: a run, a checkpoint or an export of mimae (average:RUN: its moving "
        "average), a file or folder of MAE, timm or transformers, timm:NAME from timm's cache; null: random weights "
        "from the seed (docs/weights.md)",
    )
    checkpointing: Checkpointing = setting(
        "none",
        resume="rounding",
        description="recomputation in backward, which saves memory; selective: norms and activations of each block are "
        "recomputed, products and torch's attention (sdpa, cudnn) are kept; full: each block is recomputed, which "
        "costs a third more compute",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_size(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        named = SIZES.get(str(values.get("size", "base")), {})
        return {**named, **{key: value for key, value in values.items() if value is not None}}

    @property
    def mlp(self) -> int:
        """Hidden width of a block's MLP."""
        return self.mlp_width or 4 * self.width


class DecoderSettings(Section):
    """The decoder, which is used only in pretraining."""

    width: int = Field(512, ge=4, description="decoder width")
    depth: int = Field(8, ge=1, le=1000, description="decoder blocks")
    heads: int = Field(16, ge=1, description="attention heads of the decoder")
    predict: Predict = Field(
        "hidden", description="targets of a view: all patches that it hides, or the patches that the next view shows"
    )
    attention: Literal["self", "cross"] = Field(
        "self", description="self: all tokens attend to each other; cross: targets attend only to the visible tokens"
    )
