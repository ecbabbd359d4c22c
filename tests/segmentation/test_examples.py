"""Tests of windows of images and masks: they stay aligned, and depend only on seed, epoch and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimae.data.loading.examples import Example
from mimae.data.pixels.decode import BadImage, look
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.segmentation.examples import Central, Jittered, Whole, covering, photometric
from mimae.segmentation.labels import IGNORED, Labels
from mimae.segmentation.masks import Masks
from mimae.segmentation.settings import SegmentSettings

LEVELS = (0, 90, 180, 255)
"""Brightness of each class in the images of these tests."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one image of 90 x 60 pixels, with four classes in blocks of 15 pixels, each with one brightness."""
    folder = tmp_path_factory.mktemp("pairs")
    blocks = np.random.default_rng(0).integers(0, 4, (4, 6))
    classes = np.kron(blocks, np.ones((15, 15), int)).astype(np.uint8)
    for name, values in (("images", np.array(LEVELS, np.uint8)[classes]), ("annotations", classes)):
        (folder / name).mkdir()
        Image.fromarray(values).save(folder / name / "a.png")
    return folder


def reader(kind: type, pairs: Path, *rest: Any, **keys: Any) -> Any:
    settings = SegmentSettings(**{"classes": 4, "photometric": False, "max_class_share": 1.0, **keys})
    masks = Masks(open_source(str(pairs / "images")), None, "segment.masks", Labels.of(settings), 1_000_000)
    return kind(masks, DataSettings(image_size=(32, 40)), *([settings, *rest] if rest else []))


def read(made: Any, pairs: Path, sample_id: int = 0, epoch: int = 0) -> Example:
    return made(look((pairs / "images" / "a.png").read_bytes(), 1_000_000), 0, sample_id, epoch)  # type: ignore[no-any-return]


def agreement(example: Example) -> float:
    """Return the share of pixels whose brightness is closest to that of their class; only some at borders are not."""
    classes = example.targets["classes"]
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    nearest = (example.image[..., 0].float()[..., None] - levels).abs().argmin(-1)
    return (nearest == classes)[classes != IGNORED].float().mean().item()


def test_image_and_mask_go_through_the_same_change(pairs: Path) -> None:
    """Enlarging blurs the borders between classes. A shift of two pixels would change a tenth of the pixels."""
    made = reader(Jittered, pairs, 0, scale=(1.0, 2.0))
    found = [read(made, pairs, sample_id) for sample_id in range(24)]
    assert all(example.image.shape == (32, 40, 3) for example in found)
    assert min(agreement(example) for example in found) > 0.9
    mirrored = Example(found[0].image.flip(1), found[0].targets)
    assert agreement(mirrored) < 0.8, "the test would see it"


def test_a_window_is_a_pure_function_of_seed_epoch_and_sample(pairs: Path) -> None:
    first = read(reader(Jittered, pairs, 3, photometric=True), pairs, 7, 2)
    torch.manual_seed(1)
    again = read(reader(Jittered, pairs, 3, photometric=True), pairs, 7, 2)
    assert torch.equal(first.image, again.image) and torch.equal(first.targets["classes"], again.targets["classes"])
    for seed, sample_id, epoch in ((4, 7, 2), (3, 8, 2), (3, 7, 3)):
        other = read(reader(Jittered, pairs, seed, photometric=True), pairs, sample_id, epoch)
        assert not torch.equal(first.image, other.image)


def test_small_scales_are_padded_and_their_padding_is_ignored(pairs: Path) -> None:
    example = read(reader(Jittered, pairs, 0, scale=(0.5, 0.5)), pairs)
    height, width = covering((60, 90), (32, 40), 0.5)
    classes = example.targets["classes"]
    assert (height, width) == (16, 24) and (classes != IGNORED).sum() == height * width


def test_a_window_that_one_class_fills_is_drawn_anew(pairs: Path) -> None:
    """Windows at scale 4 are about two blocks wide; without the limit some are of one class."""

    def largest(**keys: Any) -> list[float]:
        made = reader(Jittered, pairs, 0, scale=(4.0, 4.0), **keys)
        counts = [torch.bincount(read(made, pairs, i).targets["classes"].flatten().long()) for i in range(20)]
        return [(count.max() / count.sum()).item() for count in counts]

    assert max(largest()) > 0.75 >= max(largest(max_class_share=0.75))


def test_evaluation_sees_whole_images_and_pictures_their_centre(pairs: Path) -> None:
    whole, central = read(reader(Whole, pairs), pairs), read(reader(Central, pairs), pairs)
    assert whole.image.shape == (32, 48, 3) and whole.targets["classes"].shape == (60, 90)
    assert central.image.shape == (32, 40, 3) and agreement(central) > 0.93
    torch.testing.assert_close(central.image, whole.image[:, 4:44])


@pytest.mark.parametrize(
    ("size", "window", "expected"),
    [
        ((683, 1024), (512, 512), (512, 768)),
        ((100, 100), (512, 512), (512, 512)),
        ((1, 10_000), (512, 512), (1, 2048)),
        ((60, 90), (32, 40), (32, 48)),
    ],
)
def test_scale_1_covers_the_window(size: tuple[int, int], window: tuple[int, int], expected: tuple[int, int]) -> None:
    """For square windows the size is that of mmsegmentation's resize to (2048, 512)."""
    assert covering(size, window) == expected


def test_photometric_changes_are_made_half_of_the_time_and_stay_in_range() -> None:
    image = torch.arange(96, 160, dtype=torch.uint8).expand(3, 8, 64).clone()
    image[0] = 255 - image[0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 1 << 32, (200, 8), generator=generator)
    changed = [photometric(image, each) for each in drawn]
    same = sum(torch.equal(each, image) for each in changed)
    assert 4 <= same <= 25, "one of 16 draws changes nothing"
    assert all(each.dtype == torch.uint8 for each in changed)

    def alone(which: int) -> Tensor:
        """Return the image with one change at its largest."""
        words = torch.full((8,), (1 << 32) - 1)
        words[which] = 0
        return photometric(image, words).int()

    assert (alone(0) - image.int()).max() == 32
    assert (alone(1).float().std() / image.float().std()).item() == pytest.approx(1.5, abs=0.02)
    assert not torch.equal(alone(3), image.int())


def test_a_mask_of_another_size_than_its_image_is_refused(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("L", (90, 60)).save(tmp_path / "images" / "a.png")
    Image.new("L", (60, 90)).save(tmp_path / "annotations" / "a.png")
    with pytest.raises(BadImage, match=r"annotations/a\.png: it has 60 x 90 pixels, but the image has 90 x 60"):
        read(reader(Whole, tmp_path), tmp_path)
