"""Data settings: which images are read, how samples are cropped and resized, and how many workers do it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mimae.config.section import PATH, Section, setting

Side = Annotated[int, Field(ge=1, le=16384)]

INDEX_VERSION = 2
"""Version of the newest rules that decide which files of a source become samples."""

PathText = Annotated[str, Field(min_length=1, json_schema_extra=PATH)]

PILLOW_LIMIT = 178_956_970
"""Largest number of pixels for which Pillow opens an image; `max_pixels` cannot be larger."""


class DataSettings(Section):
    """Where the images come from and how a sample is cropped from its image."""

    path: PathText = setting(
        "photos",
        resume="free",
        description="training images: photos (embedded), a folder, a list file, tar shards, Parquet files, "
        "a mixture or torchvision:NAME:ROOT, see [data.md](data.md)",
    )
    val_path: PathText | None = setting(
        None,
        resume="free",
        description="held-out images, in any form that `data.path` accepts; null: none; replacing `data.path` resets "
        "it to null unless it is given too",
    )
    subset: PathText | None = Field(
        None,
        description="part of the training images that is used: a share, as 10%, or a number of images, drawn evenly "
        "from all classes, the same ones in every run; or a list file with a name on each line; null: all",
    )
    shuffle: Literal["full", "blocks"] = Field(
        "full",
        description="order of an epoch; full: one permutation of all samples; blocks: shuffle the blocks (shards, row "
        "groups, runs of files), then the samples within groups of blocks, for storage with slow random reads",
    )
    loader: Literal["auto", "dali_gpu", "dali_cpu", "torch"] = Field(
        "auto",
        description="backend that decodes and crops the images, see [data.md](data.md#loaders); auto: the cheapest "
        "one that is fast enough, as measured when a run starts",
    )
    decode: Literal["exact", "scaled"] = Field(
        "exact",
        description="how random crops of pretraining and classification are decoded; exact: all their pixels; scaled: "
        "a baseline JPEG at 1/2, 1/4 or 1/8 of its size where the crop then still has twice the sides of a sample, "
        "which is faster for large photographs and needs the loader torch, see [data.md](data.md#large-photographs)",
    )
    image_key: str | None = Field(
        None,
        min_length=1,
        description="where the images are stored: a column of Parquet files, or the extension of members of a tar "
        "shard (input.jpg); null: found by type and name",
    )
    label_key: str | None = Field(
        None,
        min_length=1,
        description="where the classes are stored: a column of Parquet files, the extension of members of a tar shard, "
        "or a field of their .json; null: found by name",
    )
    index_version: int = Field(
        INDEX_VERSION,
        ge=1,
        le=INDEX_VERSION,
        description="version of the rules that decide which files of a source become samples; a run keeps the version "
        "it was started with; 1: fewer extensions, no splits, see [data.md](data.md#what-is-an-image)",
    )
    range: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="value of a 16-bit pixel that is mapped to 255, for example 4095 for 12-bit data; null: 65535",
    )
    image_size: Side | tuple[Side, Side] = Field(
        224, description="size of a sample in pixels: the side of a square, or [height, width]"
    )
    crop_scale: tuple[float, float] | None = Field(
        (0.2, 1.0), description="area of the random crop as a fraction of the image; null: the largest central crop"
    )
    flip: bool = Field(True, description="flip each training sample horizontally with probability 1/2")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="mean of red, green and blue in [0, 1]")
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="standard deviation of red, green and blue in [0, 1]"
    )
    workers: int | None = setting(
        None,
        resume="free",
        ge=0,
        le=1024,
        description="worker processes per rank; null: one per core; 0: load in the training process",
    )
    cache: Literal["encoded", "decoded"] | None = setting(
        None,
        resume="rounding",
        description="cache each sample after its first read: encoded: the file's bytes; decoded: its pixels (about six "
        "times as large for photographs); null: no cache",
    )
    cache_dir: PathText | None = setting(
        None, resume="free", description="folder of the cache, ideally on a local disk; null: /dev/shm (RAM)"
    )
    max_bad_fraction: float = setting(
        0.01, resume="free", ge=0, le=1, description="fraction of unreadable samples above which the run stops"
    )
    max_bytes: int = Field(
        400_000_000,
        ge=1,
        le=2_000_000_000,
        description="largest size of an encoded image in bytes; larger ones are refused before they are read",
    )
    max_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_LIMIT, description="largest number of pixels of an image, checked before decoding"
    )

    @model_validator(mode="after")
    def _decodes_once(self) -> DataSettings:
        if self.decode == "scaled" and self.cache == "decoded":
            raise ValueError(
                "decode=scaled has no effect with cache=decoded, which holds all pixels; legal is one of them"
            )
        return self

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of a sample in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @field_validator("crop_scale")
    @classmethod
    def _is_a_range(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("legal: [low, high] with 0 < low <= high <= 1, or null")
        return scale

    @field_validator("std")
    @classmethod
    def _is_positive(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("legal: three numbers above 0")
        return std
