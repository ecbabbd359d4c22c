"""Settings of semantic segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mimae.config.section import PATH, Scale, Section, setting

LARGEST_ID = 65_535
"""Largest value of a pixel in a mask."""

PathText = Annotated[str, Field(min_length=1, json_schema_extra=PATH)]

Id = Annotated[int, Field(ge=0, le=LARGEST_ID)]


class SegmentSettings(Section):
    """Masks, classes, the head, and how images are scaled and cut."""

    masks: PathText | None = setting(
        None,
        resume="free",
        description="folder with the masks of the images of data.path, under the same names but for the extension; "
        "null: a list file names them after its images, and in a folder images/ they lie beside it in annotations/",
    )
    val_masks: PathText | None = setting(None, resume="free", description="the same for the images of data.val_path")
    classes: Annotated[int, Field(ge=2, le=32_767)] | tuple[str, ...] | None = Field(
        None, description="the number of classes, or their names in order; it has to be given"
    )
    ids: tuple[Id | tuple[Id, ...], ...] | None = Field(
        None,
        description="value that each class has in the masks, in the order of the classes, or a list of several values; "
        "null: 0, 1, 2, ... without those of segment.ignore",
    )
    ignore: tuple[Id, ...] = Field(
        (255,), description="values in the masks of pixels that are neither learned nor judged"
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
        description="the four blocks of the encoder, from 0, whose maps the head sees, ascending, the last block among "
        "them; null: those after a third, half, two thirds and all of the depth",
    )
    width: int = Field(768, ge=8, description="upernet: channels of the head")
    auxiliary: float = Field(
        0.4, ge=0, description="upernet: weight of the loss of a second, small head on the third map; 0: there is none"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="upernet: share of the channels that each image loses")
    scale: Scale = Field(
        (0.5, 2.0),
        description="range of the random scale of an image, where 1 is the smallest that covers data.image_size; "
        "windows of this size are cut out of it",
    )
    max_class_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="a window in which one class has more than this share is drawn anew, up to ten times; 1: any is "
        "taken",
    )
    photometric: bool = Field(True, description="change brightness, contrast, saturation and hue at random")
    stride: float = setting(
        0.5,
        resume="free",
        gt=0,
        le=1,
        description="evaluation: distance between the windows of data.image_size that an image is seen through, as a "
        "share of their sides",
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
        return classes

    @model_validator(mode="after")
    def _each_value_once(self) -> SegmentSettings:
        if self.ids is None or self.classes is None:
            return self
        if len(self.ids) != self.number:
            raise ValueError(f"ids has values for {len(self.ids)} classes, and classes says {self.number}")
        values = [*self.ignore, *(value for values in self.values() for value in values)]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"the value {twice[0]} stands twice in ids and ignore; legal is each value once")
        return self

    @property
    def number(self) -> int:
        """The number of classes; 0 where it is not given."""
        return len(self.classes) if isinstance(self.classes, tuple) else self.classes or 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, their numbers where they have none."""
        return self.classes if isinstance(self.classes, tuple) else tuple(map(str, range(self.number)))

    def values(self) -> list[tuple[int, ...]]:
        """Return the values that each class has in the masks."""
        if self.ids is not None:
            return [(each,) if isinstance(each, int) else each for each in self.ids]
        used = (value for value in range(LARGEST_ID + 1) if value not in self.ignore)
        return [(value,) for _, value in zip(range(self.number), used)]

    def maps(self, depth: int) -> tuple[int, ...]:
        """Return the four blocks, of `depth`, whose maps the head sees."""
        if self.blocks is not None:
            return self.blocks
        return tuple(max(end, 1) - 1 for end in (depth // 3, depth // 2, 2 * depth // 3, depth))
