"""RandAugment: timm's own pixels, both generators left as they were, and the operation that Pillow refuses."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from mimae.data.pixels import rand_augment
from mimae.data.pixels.rand_augment import RandAugment

MEAN = (0.485, 0.456, 0.406)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)


def test_the_pixels_are_those_of_the_published_transform() -> None:
    """Return the transform that `create_transform` builds for MAE's fine-tuning."""
    theirs: Any = rand_augment_transform(
        "rand-m9-mstd0.5-inc1",
        {"translate_const": 7, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC},
    )
    ours = RandAugment(9, 0.5, MEAN, (16, 20))
    assert [str(op) for op in ours.transform.ops] == [str(op) for op in theirs.ops]
    compared = 0
    for seed in range(200):
        random.seed(seed)
        np.random.seed(seed + 1)
        try:
            expected = np.asarray(theirs(Image.fromarray(PIXELS)))
        except ValueError:  # of Pillow 13, see below
            continue
        assert np.array_equal(ours(PIXELS, [seed, seed + 1]), expected)
        compared += 1
    assert compared > 190


def test_both_generators_are_left_as_they_were() -> None:
    random.seed(5)
    np.random.seed(6)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(6)
    first = RandAugment(9, 0.5, MEAN, (16, 20))(PIXELS, [1, 2])
    assert (random.random(), np.random.random()) == expected
    assert np.array_equal(RandAugment(9, 0.5, MEAN, (16, 20))(PIXELS, [1, 2]), first)


def test_magnitude_ten_posterizes_to_black() -> None:
    """timm then keeps 0 bits: a black image with older versions of Pillow, an error from version 13 on."""
    image = Image.fromarray(PIXELS)
    op: Any = next(op for op in RandAugment(10, 0.0, MEAN, (16, 20)).transform.ops if op.name.startswith("Posterize"))
    op.prob = 1.0
    assert not np.asarray(op(image)).any()
    for bits in range(1, 9):
        ours, theirs = rand_augment._posterize(image, bits), ImageOps.posterize(image, bits)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_two_of_fifteen_operations_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 images: each operation is applied to 1/15 of them (2 x 1/15 x 1/2), with a deviation of 0.0046."""
    augment, applied, magnitudes = RandAugment(9, 0.5, MEAN, (16, 20)), Counter[str](), list[float]()

    def level(op: Any) -> Any:
        def note(magnitude: float, _: Any) -> tuple[()]:
            magnitudes.append(magnitude)
            return ()

        return note

    for op in augment.transform.ops:
        assert isinstance(op, AugmentOp)
        op.level_fn = level(op)
        op.aug_fn = lambda image, name=op.name, **_: applied.update([name]) or image
    generator = random.Random(0)
    for _ in range(3000):
        augment(PIXELS, [generator.getrandbits(32), generator.getrandbits(32)])
    assert len(applied) == 15
    assert all(count / 3000 == pytest.approx(1 / 15, abs=0.02) for count in applied.values())
    drawn = np.array(magnitudes)
    assert drawn.max() == 10.0 and (drawn == 10).mean() == pytest.approx(0.023, abs=0.01), "beyond two deviations"
    assert np.median(drawn) == pytest.approx(9, abs=0.05)


def test_it_is_sent_to_workers() -> None:
    copy = pickle.loads(pickle.dumps(RandAugment(9, 0.5, MEAN, (16, 20))))
    assert np.array_equal(copy(PIXELS, [3, 4]), RandAugment(9, 0.5, MEAN, (16, 20))(PIXELS, [3, 4]))
