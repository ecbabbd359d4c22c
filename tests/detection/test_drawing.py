"""Tests of the pictures of objects: they can be read, at any size of the image."""

from __future__ import annotations

import torch
from PIL import Image

from mimae.detection.drawing import drawn
from mimae.segmentation.overlays import with_legend
from mimae.telemetry.pictures import colours


def test_small_images_are_enlarged_and_a_class_has_its_colour() -> None:
    """Draw on grey, so that every colour is that of a class or of its text; the labels at the border are not cut."""
    image = torch.full((40, 64, 3), 128, dtype=torch.uint8)
    boxes, labels = torch.tensor([[4.0, 4.0, 30.0, 30.0], [60.0, 30.0, 64.0, 40.0]]), torch.tensor([1, 2])
    picture = drawn(image, boxes, labels, ["disc", "a longer name"], torch.tensor([0.9, 0.8]))
    assert picture.shape == (8 * 40, 8 * 64, 3)
    disc, other = (torch.tensor(colour) for colour in colours(2))
    assert (picture[8 * 4, 8 * 10 : 8 * 20] == disc).all(), "the upper edge"
    in_other = (picture == other).all(-1).nonzero()
    assert in_other[:, 1].max() < 8 * 64 and in_other[:, 1].min() < 8 * 60 - 60, "the label begins left of its box"
    masks = torch.zeros(2, 40, 64, dtype=torch.bool)
    masks[0, 10:20, 10:20] = True
    inside = drawn(image, boxes, labels, ["disc", "bar"], masks=masks)[8 * 15, 8 * 15].float()
    expected = 0.45 * disc + 0.55 * 128
    assert (inside - expected).abs().max() <= 1
    assert torch.equal(drawn(image, boxes[:0], labels[:0], ["disc"]), torch.full((320, 512, 3), 128, dtype=torch.uint8))


def test_a_legend_is_as_wide_as_its_longest_name() -> None:
    narrow = with_legend(Image.new("RGB", (40, 40)), [0, 1], ["sky", "a name that is longer than the picture"])
    wide = with_legend(Image.new("RGB", (900, 40)), [0, 1], ["sky", "a name that is longer than the picture"])
    assert 250 < narrow.width < 400 and wide.size == (900, 62) and narrow.height == 84
