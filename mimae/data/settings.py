"""The settings of the data: which images, cut to which size, by how many workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mimae.config.section import PATH, Section, setting

Side = Annotated[int, Field(ge=1, le=16384)]

INDEX_VERSION = 2
"""The newest rules by which a source's files become samples."""

PathText = Annotated[str, Field(min_length=1, json_schema_extra=PATH)]

PILLOW_LIMIT = 178_956_970
"""Pixels above which Pillow itself refuses to open an image, whatever `max_pixels` says."""


class DataSettings(Section):
    """Where the images come from and how a sample is cut from its image."""

    path: PathText = setting(
        "photos",
        resume="free",
        description="training images: photos (embedded), a folder, a list file, tar shards, Parquet files, "
        "a mixture or torchvision:NAME:ROOT, see [data.md](data.md)",
    )
    val_path: PathText | None = setting(
        None,
        resume="free",
        description="held-out images, as path; null: none, as where another `data.path` is given without it",
    )
    shuffle: Literal["full", "blocks"] = Field(
        "full",
        description="order of an epoch: any sample anywhere, or blocks (shards, row groups, runs of files) "
        "shuffled, and samples within groups of blocks: for storage that is slow at random reads",
    )
    loader: Literal["auto", "dali_gpu", "dali_cpu", "torch"] = Field(
        "auto",
        description="what decodes and cuts the images, see [data.md](data.md#loaders); auto: the fastest one, by "
        "measurement when a run starts",
    )
    image_key: str | None = Field(
        None,
        min_length=1,
        description="what holds the images: a column of Parquet files, the ending of a shard's members (input.jpg); "
        "null: found by type and name",
    )
    label_key: str | None = Field(
        None,
        min_length=1,
        description="what holds the classes: a column of Parquet files, the ending of a shard's members or a field of "
        "their .json; null: found by name",
    )
    index_version: int = Field(
        INDEX_VERSION,
        ge=1,
        le=INDEX_VERSION,
        description="rules by which the files of a source become its samples; a run keeps the ones it was started "
        "with; 1: fewer endings, no splits, see [data.md](data.md#what-is-an-image)",
    )
    range: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="value of a 16-bit pixel that becomes white, as 4095 for 12 bits; null: 65535",
    )
    image_size: Side | tuple[Side, Side] = Field(
        224, description="pixels of a sample: one side of a square, or [height, width]"
    )
    crop_scale: tuple[float, float] | None = Field(
        (0.2, 1.0), description="area of the random crop as a share of the image; null: the centre, uncropped"
    )
    flip: bool = Field(True, description="mirror half of the training samples left to right")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="mean of red, green and blue in [0, 1]")
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="deviation of red, green and blue in [0, 1]"
    )
    workers: int | None = setting(
        None,
        resume="free",
        ge=0,
        le=1024,
        description="decoding processes of a rank; null: one per core; 0: none",
    )
    cache: Literal["encoded", "decoded"] | None = setting(
        None,
        resume="rounding",
        description="keep what was read once: encoded as it is, or decoded as pixels (of photographs some six times as "
        "much); null: no",
    )
    cache_dir: PathText | None = setting(
        None, resume="free", description="folder of the cache, best on a disk of the node; null: in RAM, /dev/shm"
    )
    max_bad_fraction: float = setting(
        0.01, resume="free", ge=0, le=1, description="share of unreadable samples past which the run stops"
    )
    max_bytes: int = Field(
        400_000_000,
        ge=1,
        le=2_000_000_000,
        description="bytes past which an encoded image is refused before it is read",
    )
    max_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_LIMIT, description="pixels past which an image is refused before decoding"
    )

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
