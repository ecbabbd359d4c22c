"""Settings of the tasks that train on a pretrained encoder."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mimae.config.section import Resume, Section

Blocks = Annotated[int, Field(ge=1)]


class FinetuneSettings(Section):
    """Training of the pretrained encoder."""

    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a layer of the encoder, as a share of the next layer's rate; the head has the "
        "full rate",
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the images for which attention and MLP of the last block are skipped, independently of "
        "each other; the share rises linearly from 0 for the first block",
    )
    freeze: Literal["none", "all"] | Blocks = Field(
        "none",
        description="part of the encoder that is not trained: none, all of it, or the patch embedding and the given "
        "number of first blocks",
    )


class EvaluationSettings(Section):
    """The part of an image that is evaluated."""

    on_resume: ClassVar[Resume] = "free"

    crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="classifiers: side of the central window that is evaluated, as a share of the largest window; "
        "0.875 is the usual crop of 224 pixels from 256",
    )


class HeadSettings(Section):
    """The classifier on top of the encoder."""

    pooling: Literal["mean", "class_token"] = Field(
        "mean", description="input of the classifier: the mean of the patch tokens, or the class token"
    )
    norm: Literal["fc_norm", "batch_norm", "none"] = Field(
        "fc_norm",
        description="fc_norm: a new layer norm after the pooling replaces the encoder's norm, as in MAE's fine-tuning; "
        "batch_norm: the encoder's norm, then a batch norm over the global batch without scale and shift, for frozen "
        "encoders, as in MAE's linear probing; none: only the encoder's norm",
    )
    init_std: float = Field(2e-5, ge=0, description="standard deviation of the classifier's initial weights")


class AugmentSettings(Section):
    """Augmentation of training images and labels, in addition to the crop and the flip of `data`."""

    rand_augment: float | None = Field(
        None,
        ge=0,
        le=10,
        description="magnitude of RandAugment (timm's rand-mM-mstdS-inc1: two of 15 operations, each applied with "
        "probability 0.5); null: no RandAugment",
    )
    rand_augment_std: float = Field(0.5, ge=0, description="standard deviation of RandAugment's magnitude")
    erase: float = Field(
        0.0, ge=0, le=1, description="share of the images in which a rectangle is replaced by Gaussian noise"
    )
    mixup: float = Field(
        0.0, ge=0, le=1, description="alpha of mixup: an image's weight is from Beta(alpha, alpha); 0: no mixup"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=1,
        description="alpha of cutmix: the kept share of an image is drawn from Beta(alpha, alpha); 0: no cutmix",
    )
    mix: float = Field(1.0, ge=0, le=1, description="share of the batches that are mixed, if mixup or cutmix is on")
    cutmix_share: float = Field(
        0.5, ge=0, le=1, description="share of the mixed batches that use cutmix, if mixup and cutmix are both on"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label that is spread evenly over all classes"
    )

    @property
    def mixes(self) -> bool:
        """True if images are mixed in pairs."""
        return self.mix > 0 and (self.mixup > 0 or self.cutmix > 0)
