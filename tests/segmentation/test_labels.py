"""Tests of the conversion from mask values to classes."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from mimae.data.pixels.decode import BadImage
from mimae.errors import UserError
from mimae.segmentation.labels import IGNORED, Labels
from mimae.segmentation.settings import SegmentSettings


def test_without_ids_classes_have_the_values_from_0_on() -> None:
    found = Labels.of(SegmentSettings(classes=3)).classes(np.array([[0, 1], [2, 255]]))
    assert found.tolist() == [[0, 1], [2, IGNORED]] and found.dtype == np.int16


def test_values_that_are_ignored_are_left_out_of_the_count() -> None:
    """ADE20K has 150 classes with the values 1 to 150; 0 is ignored in the evaluation."""
    found = Labels.of(SegmentSettings(classes=150, ignore=(0, 255))).classes(np.array([0, 1, 150, 255]))
    assert found.tolist() == [IGNORED, 0, 149, IGNORED]


def test_ids_map_values_with_holes_and_several_to_one_class() -> None:
    settings = SegmentSettings(classes=("road", "thing"), ids=(7, (300, 65535)), ignore=(0,))
    assert Labels.of(settings).classes(np.array([7, 300, 65535, 0])).tolist() == [0, 1, 1, IGNORED]


@pytest.mark.parametrize("value", [3, 254, 65535, 70000, -1])
def test_a_value_beyond_the_classes_is_named(value: int) -> None:
    with pytest.raises(BadImage, match=rf"1 pixels have values that are no class: {value}; legal are 0 to 2.*\[255\]"):
        Labels.of(SegmentSettings(classes=3)).classes(np.array([[0, value]]))


def test_classes_have_to_be_given() -> None:
    with pytest.raises(UserError, match=r"segment\.classes=null.*number of classes"):
        Labels.of(SegmentSettings())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": 3, "ids": (1, 2)}, "ids has values for 2 classes, but classes has 3"),
        ({"classes": 2, "ids": (1, (2, 1))}, "the value 1 occurs twice"),
        ({"classes": 2, "ids": (1, 255)}, "the value 255 occurs twice"),
        ({"classes": ("a", "a")}, "each once"),
        ({"classes": ("a", "b\nc")}, "names on one line"),
        ({"classes": ("a", " ")}, "names on one line"),
        ({"classes": 2, "ids": (1, ())}, "at least 1 item"),
        ({"blocks": (3, 1, 5, 7)}, "ascending"),
        ({"scale": (2.0, 1.0)}, "low <= high"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SegmentSettings.model_validate(keys)


@pytest.mark.parametrize(("depth", "expected"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (1, (0, 0, 0, 0))])
def test_the_default_blocks_are_those_of_the_published_recipes(depth: int, expected: tuple[int, ...]) -> None:
    assert SegmentSettings().maps(depth) == expected
