"""Settings of object detection."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mimae.config.section import PATH, Scale, Section, setting

PathText = Annotated[str, Field(min_length=1, json_schema_extra=PATH)]

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first six of COCO's twelve measures, in COCO's order."""

PRECISIONS = tuple(f"{kind}_{name}" for name in NAMES for kind in ("box", "mask"))
"""The measures of boxes and of masks, the most important first."""


class DetectSettings(Section):
    """Annotations, the detector's heads and the scaling of images."""

    annotations: PathText | None = setting(
        None,
        resume="free",
        description="COCO file (instances_*.json) of the images of data.path; required",
    )
    val_annotations: PathText | None = setting(
        None, resume="free", description="COCO file of the images of data.val_path"
    )
    panoptic: PathText | None = setting(
        None,
        resume="free",
        description="folder with the panoptic PNG of each image, which gives the masks of objects with a segment_id; "
        "null: masks come from the COCO file",
    )
    val_panoptic: PathText | None = setting(
        None, resume="free", description="folder with the panoptic PNGs of data.val_path"
    )
    masks: bool = Field(True, description="learn masks of objects in addition to their boxes")
    scale: Scale = Field(
        (0.1, 2.0),
        description="range of the random scale of an image; at scale 1 it just fits into data.image_size; [1, 1]: no "
        "random scale",
    )
    max_objects: int = Field(
        100, ge=1, le=1000, description="maximal number of objects of a training image; the largest are kept"
    )
    window: int = Field(
        14,
        ge=0,
        description="side, in patches, of the windows in which most blocks attend; 0: all blocks attend to the whole "
        "image",
    )
    global_blocks: int = Field(
        4, ge=1, description="number of blocks that attend to the whole image, evenly spread and including the last one"
    )
    relative_positions: bool = Field(
        True, description="add learned decomposed relative positions to attention; their initial values are zero"
    )
    width: int = Field(256, ge=8, description="channels of the feature pyramid and of the convolutions of the heads")
    box_width: int = Field(1024, ge=8, description="width of the fully connected layer of the box head")
    score: float = Field(0.05, ge=0, lt=1, description="detections with a lower score are left out")
