"""Settings of semantic segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mimae.config.section import PATH, Scale, Section, setting

LARGEST_ID = 65_535
"""Largest allowed value of a pixel in a mask."""

PathText = Annotated[str, Field(min_length=1, json_schema_extra=PATH)]

Id = Annotated[int, Field(ge=0, le=LARGEST_ID)]


class SegmentSettings(Section):
    """Masks, classes, the head, and the scaling and cutting of images."""

    masks: PathText | None = setting(
        None,
        resume="free",
        description="folder with the masks of the images of data.path, with the names of the images and other "
        "extensions; null: a list file names the masks, and for a folder images/ they are in annotations/ next to it",
    )
    val_masks: PathText | None = setting(
        None, resume="free", description="folder with the masks of the images of data.val_path, as segment.masks"
    )
    classes: Annotated[int, Field(ge=2, le=32_767)] | tuple[str, ...] | None = Field(
        None, description="the number of classes, or their names in order; required"
    )
    ids: tuple[Id | Annotated[tuple[Id, ...], Field(min_length=1)], ...] | None = Field(
        None,
        description="value of each class in the masks, in the order of the classes; a class can have a list of values; "
        "null: 0, 1, 2, ... without the values of segment.ignore",
    )
    ignore: tuple[Id, ...] = Field(
        (255,), description="values in the masks of pixels that are ignored in training and evaluation"
    )
    head: Literal["upernet", "linear"] = Field(
        "upernet",
        description="upernet: a pyramid of four maps, with pooling and convolutions, as in the published results; "
        "linear: one linear layer on four maps",
    )
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description="the four blocks of the encoder, counted from 0 and ascending, whose maps are the head's input; "
        "the last block must be one of them; null: the blocks at a third, half, two thirds and all of the depth",
    )
    relative_positions: bool = Field(
        False,
        description="add a learned bias for each distance between two patches to the logits of attention, which begins "
        "at zero, as MAE's recipe for ADE20K does; attention is then torch's own",
    )
    width: int = Field(768, ge=8, description="upernet: channels of the head")
    auxiliary: float = Field(
        0.4, ge=0, description="upernet: weight of the loss of an auxiliary head on the third map; 0: no such head"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="upernet: share of the channels that is dropped per image")
    scale: Scale = Field(
        (0.5, 2.0),
        description="range of the random scale of an image; at scale 1 it just covers data.image_size, the size of the "
        "windows that are cut out of it",
    )
    max_class_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="a window in which one class has more than this share is drawn again, up to ten times; 1: every "
        "window is used",
    )
    photometric: bool = Field(True, description="change brightness, contrast, saturation and hue at random")
    stride: float = setting(
        0.5,
        resume="free",
        gt=0,
        le=1,
        description="evaluation: distance between the sliding windows of data.image_size, as a share of their sides",
    )

    @field_validator("blocks")
    @classmethod
    def _ascends(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if blocks is not None and list(blocks) != sorted(blocks):
            raise ValueError("legal: four blocks in ascending order")
        return blocks

    @field_validator("classes")
    @classmethod
    def _are_several(cls, classes: int | tuple[str, ...] | None) -> int | tuple[str, ...] | None:
        if isinstance(classes, tuple) and (len(classes) < 2 or len(set(classes)) < len(classes)):
            raise ValueError("legal: at least 2 names, each once")
        if isinstance(classes, tuple) and not all(name.strip() and name.isprintable() for name in classes):
            raise ValueError("legal: names on one line, without control characters")
        return classes

    @model_validator(mode="after")
    def _each_value_once(self) -> SegmentSettings:
        if self.ids is None or self.classes is None:
            return self
        if len(self.ids) != self.number:
            raise ValueError(f"ids has values for {len(self.ids)} classes, but classes has {self.number}")
        values = [*self.ignore, *(value for values in self.values() for value in values)]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"the value {twice[0]} occurs twice in ids and ignore; legal is each value once")
        return self

    @property
    def number(self) -> int:
        """The number of classes; 0 if it is not set."""
        return len(self.classes) if isinstance(self.classes, tuple) else self.classes or 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers if they have no names."""
        return self.classes if isinstance(self.classes, tuple) else tuple(map(str, range(self.number)))

    def values(self) -> list[tuple[int, ...]]:
        """Return the values of each class in the masks."""
        if self.ids is not None:
            return [(each,) if isinstance(each, int) else each for each in self.ids]
        used = (value for value in range(LARGEST_ID + 1) if value not in self.ignore)
        return [(value,) for _, value in zip(range(self.number), used)]

    def maps(self, depth: int) -> tuple[int, ...]:
        """Return the four of `depth` blocks whose maps are the head's input."""
        if self.blocks is not None:
            return self.blocks
        return tuple(max(end, 1) - 1 for end in (depth // 3, depth // 2, 2 * depth // 3, depth))
