"""Tests of sliding windows."""

from __future__ import annotations

import torch
from torch import Tensor

from mimae import distributed
from mimae.segmentation.windows import classes_at, corners, slide

PAPER = torch.tensor([1, 2, 3], dtype=torch.uint8)


def image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def smooth(images: Tensor) -> Tensor:
    """Return logits (B, 3, H, W) that depend on the whole window, in place of a model."""
    planes = images.permute(0, 3, 1, 2).float()
    return planes + planes.mean((2, 3), keepdim=True)


def test_windows_cover_the_image_and_end_with_it() -> None:
    """The positions are mmsegmentation's: windows of 512 pixels at a distance of 256, in an image of 512 x 683."""
    assert corners((512, 683), (512, 512), 0.5) == [(0, 0), (0, 171)]
    assert corners((8, 8), (8, 8), 0.5) == [(0, 0)]
    assert corners((17, 8), (8, 8), 0.5) == [(0, 0), (4, 0), (8, 0), (9, 0)]
    assert corners((20, 8), (8, 8), 1.0) == [(0, 0), (8, 0), (12, 0)]


def test_an_image_of_the_windows_size_is_one_forward() -> None:
    one = image(8, 12)
    with distributed.alone():
        assert torch.equal(slide(smooth, one, (8, 12), 0.5, PAPER), smooth(one[None])[0])


def test_overlapping_windows_are_averaged() -> None:
    """17 x 9 pixels need more windows of 8 pixels than one forward has. Each pixel equals the mean computed by hand."""
    one = image(17, 9)
    with distributed.alone():
        found = slide(smooth, one, (8, 8), 0.5, PAPER)
    total, count = torch.zeros(3, 17, 9), torch.zeros(17, 9)
    for top in (0, 4, 8, 9):
        for left in (0, 1):
            total[:, top : top + 8, left : left + 8] += smooth(one[None, top : top + 8, left : left + 8])[0]
            count[top : top + 8, left : left + 8] += 1
    torch.testing.assert_close(found, total / count)


def test_an_image_smaller_than_a_window_is_filled_up() -> None:
    one = image(3, 8)
    whole = PAPER.expand(8, 8, 3).clone()
    whole[:3] = one
    with distributed.alone():
        assert torch.equal(slide(smooth, one, (8, 8), 0.5, PAPER), smooth(whole[None])[0, :, :3])


def test_the_best_class_does_not_depend_on_how_many_are_enlarged_at_once() -> None:
    logits = torch.randn(37, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(logits[None], (11, 13), mode="bilinear", align_corners=False)
    assert torch.equal(classes_at(logits, (11, 13)), whole[0].argmax(0))
