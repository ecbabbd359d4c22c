"""Conversion of a user's images (tensors, arrays, Pillow images) to one batch of uint8 pixels.

Letters in shapes: B images, H rows and W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Picture = Tensor | np.ndarray | Image.Image
"""One image: uint8 (H, W, 3), or a Pillow image of any mode."""

Images = Picture | Sequence[Picture]
"""Several images of one size, uint8 (B, H, W, 3), or one image."""


def batch_of(images: Images, device: torch.device) -> Tensor:
    """Return images as uint8 (B, H, W, 3) on `device`; B is 1 for a single one.

    Raises ValueError for other dtypes and shapes, and for images of several sizes.
    """
    if isinstance(images, Sequence):
        pixels = [_pixels(image) for image in images]
        sizes = sorted({tuple(image.shape) for image in pixels})
        if len(sizes) != 1 or len(sizes[0]) != 3:
            raise ValueError(f"the images of one call are (H, W, 3) and have one size; found {sizes[:3] or 'no image'}")
        batch = torch.stack(pixels)
    else:
        batch = _pixels(images)
        batch = batch if batch.dim() == 4 else batch[None]
    if batch.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[3] != 3:
        raise ValueError(
            f"images are uint8 (B, H, W, 3), values 0 to 255 and colours last, not {batch.dtype} {tuple(batch.shape)}"
        )
    return batch.to(device)


def _pixels(image: Picture) -> Tensor:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
