"""Settings of the tasks that begin with a pretrained encoder."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mimae.config.section import Resume, Section

Blocks = Annotated[int, Field(ge=1)]


class FinetuneSettings(Section):
    """How the encoder is trained on."""

    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a layer of the encoder, as a share of that of the next one; the head has the "
        "whole rate",
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the images for which the last block is skipped, its attention and its MLP each by "
        "itself; it rises linearly from 0 for the first block",
    )
    freeze: Literal["none", "all"] | Blocks = Field(
        "none", description="what of the encoder is not trained: none, all of it, or a number of its first blocks"
    )


class EvaluationSettings(Section):
    """The part of an image that is evaluated."""

    on_resume: ClassVar[Resume] = "free"

    crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="side of the central window that is evaluated, as a share of the largest one; 0.875 is the usual "
        "256 pixels of which 224 are cut",
    )


class HeadSettings(Section):
    """The classifier on top of the encoder."""

    pooling: Literal["mean", "class_token"] = Field(
        "mean", description="what of the encoder is classified: the mean of the patch tokens, or the class token"
    )
    norm: Literal["fc_norm", "batch_norm", "none"] = Field(
        "fc_norm",
        description="fc_norm: a new layer norm behind the pooling, in place of the encoder's own, as MAE's fine-tuning "
        "has it; batch_norm: the encoder's norm, then one over the global batch without scale and shift, for frozen "
        "encoders, as in MAE's linear probing; none: the encoder's norm alone",
    )
    init_std: float = Field(2e-5, ge=0, description="deviation of the classifier's first weights")


class AugmentSettings(Section):
    """Changes of training images and labels beside the crop and the flip of data."""

    rand_augment: float | None = Field(
        None,
        ge=0,
        le=10,
        description="magnitude of RandAugment (timm's rand-mM-mstdS-inc1: two operations of 15, each half of the "
        "time); null: none",
    )
    rand_augment_std: float = Field(0.5, ge=0, description="deviation of that magnitude")
    erase: float = Field(
        0.0, ge=0, le=1, description="share of the images in which a rectangle is replaced by normal noise"
    )
    mixup: float = Field(
        0.0, ge=0, le=1, description="alpha of mixup: the weight of an image is of Beta(alpha, alpha); 0: no mixup"
    )
    cutmix: float = Field(
        0.0, ge=0, le=1, description="alpha of cutmix: the share of an image that stays is of it; 0: no cutmix"
    )
    mix: float = Field(1.0, ge=0, le=1, description="share of the batches that are mixed, where mixup or cutmix is on")
    cutmix_share: float = Field(
        0.5, ge=0, le=1, description="share of the mixed batches that cutmix takes, where both are on"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label that is spread evenly over all classes"
    )

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed in pairs."""
        return self.mix > 0 and (self.mixup > 0 or self.cutmix > 0)
