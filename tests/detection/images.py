"""A small data set in COCO's layout: bright squares and discs on dark noise, with known masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "square"}, {"id": 30, "name": "disc"}]
"""Categories whose ids are not consecutive."""


def write(folder: Path, images: int, side: int = 64, seed: int = 0) -> dict[str, Any]:
    """Write images, `instances.json` with polygons and RLE, and a panoptic picture of each; return the COCO tree.

    The last image has no object.
    """
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "panoptic").mkdir()
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number in range(images):
        pixels = generator.integers(0, 60, (side, side + 8, 3), dtype=np.uint8)
        segments = np.zeros((side, side + 8, 3), np.uint8)
        name = f"{number:03}.png"
        tree["images"].append({"id": 100 + 3 * number, "file_name": name, "height": side, "width": side + 8})
        for place in range(2 if number < images - 1 else 0):
            extent = int(generator.integers(side // 4, side // 3))
            top, left = (int(each) for each in generator.integers(0, side // 2 - extent, 2))
            left += place * side // 2
            rows, columns = np.mgrid[:side, : side + 8]
            inside = (rows >= top) & (rows < top + extent) & (columns >= left) & (columns < left + extent)
            polygon = [left, top, left + extent, top, left + extent, top + extent, left, top + extent]
            segmentation: Any = [polygon]
            if (number + place) % 2:
                middle, radius = (top + extent / 2 - 0.5, left + extent / 2 - 0.5), extent / 2
                inside = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 <= radius**2
                segmentation = {"size": [side, side + 8], "counts": runs_of(inside)}
            pixels[inside] = (230, 80, 60) if (number + place) % 2 else (70, 200, 230)
            segment = 1000 * number + place + 1
            segments[inside] = (segment % 256, segment // 256 % 256, 0)
            top, bottom = np.flatnonzero(inside.any(1))[[0, -1]].tolist()
            left, right = np.flatnonzero(inside.any(0))[[0, -1]].tolist()
            tree["annotations"].append(
                {
                    "id": len(tree["annotations"]) + 1,
                    "image_id": 100 + 3 * number,
                    "category_id": CATEGORIES[(number + place) % 2]["id"],
                    "bbox": [left, top, right + 1 - left, bottom + 1 - top],
                    "area": int(inside.sum()),
                    "iscrowd": 0,
                    "segment_id": segment,
                    "segmentation": segmentation,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / name)
        Image.fromarray(segments).save(folder / "panoptic" / name)
    (folder / "instances.json").write_text(json.dumps(tree))
    return tree


def runs_of(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed RLE of a mask: lengths of runs down the columns, zeros first."""
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return [0, *lengths] if flat[0] else lengths
