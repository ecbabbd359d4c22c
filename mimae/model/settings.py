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
    """Properties of a mask kind that the checks of settings need; `masking.DRAWS` holds how it is drawn."""

    is_disjoint: bool
    """True if the views of an image share no patch; N K must then be at most L."""


MASK_KINDS = {"orthogonal": MaskKind(is_disjoint=True), "independent": MaskKind(is_disjoint=False)}
"""Every legal value of masking.kind."""

Predict = Literal["hidden", "next_view"]
"""Which patches each view's decoder predicts, see `targets`."""

PatchBias = Literal["zero", "uniform"]

Checkpointing = Literal["none", "selective", "full"]


class MaskingSettings(Section):
    """Views per image and what each of them shows."""

    kind: Literal["orthogonal", "independent"] = Field(
        "orthogonal",
        description="orthogonal: the views of an image share no patch; independent: each view is drawn alone",
    )
    num_masks: int = Field(4, ge=1, le=64, description="views per image, N")
    ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that a view hides")
    rounding: Literal["nearest", "down"] = Field(
        "nearest", description="how the number of patches that a view shows is made whole; down: as in MAE's code"
    )

    def num_visible(self, num_patches: int) -> int:
        """K, the patches that a view shows: L (1 - ratio), made whole by `rounding`, at least 1 and at most L - 1."""
        shown = num_patches * (1 - self.ratio)
        return min(max(int(shown) if self.rounding == "down" else round(shown), 1), num_patches - 1)


class ModelSettings(Section):
    """The encoder. `size` gives the numbers below it; each can be set alone, beside `size` or after it."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"] = Field(
        "base", description="named ViT size"
    )
    patch_size: int = Field(16, ge=1, description="side of a patch in pixels (default: the size's)")
    width: int = Field(768, ge=4, description="encoder width (default: the size's)")
    depth: int = Field(12, ge=1, description="encoder blocks (default: the size's)")
    heads: int = Field(12, ge=1, description="attention heads (default: the size's)")
    mlp_width: int | None = Field(
        None, ge=1, description="hidden width of an encoder block's MLP (default: the size's); null: 4 x width"
    )
    attention: Literal["auto", "sdpa", "plain", "cudnn", "xformers", "flex"] = setting(
        "auto",
        resume="rounding",
        description="what computes attention, in the decoder too; sdpa: torch's own choice; plain: two products and a "
        "softmax; auto: the fastest one, as measured when a run starts",
    )
    patch_bias: PatchBias = Field(
        "zero",
        description="where the bias of the patch projection begins; uniform: in ±1/sqrt(3 P^2), P the side of a patch, "
        "as in MAE's code",
    )
    norm_eps: float = Field(
        1e-6, gt=0, description="epsilon of every LayerNorm, in the decoder too; transformers' own default is 1e-12"
    )
    init: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=PATH,
        description="what the weights start from: a run, a checkpoint or an export of ours (average:RUN: its moving "
        "average), a file or folder of MAE, timm or transformers, timm:NAME from timm's cache; null: the seed alone "
        "(docs/weights.md)",
    )
    checkpointing: Checkpointing = setting(
        "none",
        resume="rounding",
        description="what is recomputed in backward for less memory; selective: norms and activations of each block, "
        "while products and attention are kept; full: each block, a third more compute",
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
    """The decoder; used in pretraining alone."""

    width: int = Field(512, ge=4, description="decoder width")
    depth: int = Field(8, ge=1, description="decoder blocks")
    heads: int = Field(16, ge=1, description="attention heads of the decoder")
    predict: Predict = Field(
        "hidden", description="targets of a view: all patches that it hides, or those that the next view shows"
    )
    attention: Literal["self", "cross"] = Field(
        "self", description="self: all tokens look at each other; cross: targets look at the visible tokens alone"
    )
