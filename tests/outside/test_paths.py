"""Tests of paths that a user writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimae.outside.paths import user_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("images", "/data/images"),
        ("/images", "/images"),
        ("~", "/home/me"),
        ("~/images", "/home/me/images"),
        ("./~", "/data/~"),
        ("~nobody-has-this-name/images", "/data/~nobody-has-this-name/images"),
    ],
)
def test_a_tilde_is_the_home_folder_and_other_paths_are_relative_to_the_folder(
    path: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path(path, Path("/data")) == Path(found)
