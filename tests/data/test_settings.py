"""Data settings: the limits of legal values."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mimae.data.settings import DataSettings


@pytest.mark.parametrize(
    "legal",
    [
        {"crop_scale": None},
        {"crop_scale": (1.0, 1.0)},
        {"image_size": 1},
        {"workers": 0},
        {"max_bad_fraction": 0.0},
        {"max_pixels": 178_956_970},
    ],
)
def test_borders_are_legal(legal: dict[str, Any]) -> None:
    assert DataSettings(**legal).model_dump(include=set(legal)) == legal


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.6, 0.5)),
        ("crop_scale", (0.5, 1.01)),
        ("std", (0.2, 0.0, 0.2)),
        ("image_size", 0),
        ("image_size", (32, 0)),
        ("workers", -1),
        ("max_bad_fraction", 1.1),
        ("max_pixels", 178_956_971),  # Pillow itself refuses more.
        ("path", ""),
        ("loader", "fast"),
    ],
)
def test_past_the_borders_the_key_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        DataSettings(**{key: value})
    assert {error["loc"][0] for error in refusal.value.errors()} == {key}


def test_size_in_height_and_width() -> None:
    assert DataSettings(image_size=32).size_hw == (32, 32)
    assert DataSettings(image_size=(32, 48)).size_hw == (32, 48)
