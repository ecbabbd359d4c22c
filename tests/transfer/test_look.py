"""Tests of the pictures of reconstructions, neighbours and features: their content and layout."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.transfer import look
from tests.data.conftest import write_images


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_reconstructions_take_files_and_data_sets(run: Path, images: Path, tmp_path: Path) -> None:
    """Draw a row for each of two files, and eight rows of the data set, without the unreadable image."""
    write_images(tmp_path, ["one.png", "two.png"], 16, 24)
    files = [str(tmp_path / "one.png"), str(tmp_path / "two.png")]
    found = look.reconstruct(run, [*files, str(images)])
    assert found.names[:2] == files and len(found.names) == len(found.losses) == 10
    assert all(0.1 < loss < 10 for loss in found.losses)
    alone = look.reconstruct(run, [str(images)], average=True)
    assert opened(found.png).shape[0] > opened(alone.png).shape[0]
    with pytest.raises(UserError, match=r"03.png cannot be shown: no header of an image"):
        look.reconstruct(run, [str(images / "b/03.png")])
    with pytest.raises(UserError, match="does not exist"):
        look.reconstruct(run, [str(images / "c")])


def bank(folder: Path, features: list[list[float]]) -> look.Bank:
    data = DataSettings(image_size=32)
    source = open_source(str(folder), settings=data)
    return look.Bank(source, data, torch.arange(len(source)), torch.tensor(features))


def test_neighbours_are_those_of_highest_cosine_and_never_the_image_itself(tmp_path: Path) -> None:
    """Use known features: 0 and 2 have the same direction, 1 and 3 too, with different lengths."""
    write_images(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "b/3.png"], 96, 96)
    found = bank(tmp_path, [[1.0, 0.1], [0.1, 1.0], [9.0, 0.0], [0.0, 9.0]])
    png = opened(look.neighbours(found, queries=4, nearest=1))
    tiles = [np.asarray(tile).repeat(3, 0).repeat(3, 1) for tile in found.images(torch.arange(4))]
    rows = [(0, 2), (1, 3), (2, 0), (3, 1)]
    lefts = sorted({x for row in rows for x in _places(png, tiles[row[0]], tiles[row[1]])})
    assert len(lefts) == 2
    for query, near in rows:
        assert any(x == lefts[0] for _, x in _found(png, tiles[query]))
        at = next(y for y, x in _found(png, tiles[query]) if x == lefts[0])
        assert (at, lefts[1]) in _found(png, tiles[near])


def _found(png: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    height, width = tile.shape[:2]
    first = (png[: -height + 1, : -width + 1] == tile[0, 0]).all(-1)
    return [(y, x) for y, x in np.argwhere(first).tolist() if np.array_equal(png[y : y + height, x : x + width], tile)]


def _places(png: np.ndarray, *tiles: np.ndarray) -> list[int]:
    return [x for tile in tiles for _, x in _found(png, tile)]


def test_a_map_shows_the_image_nearest_to_the_middle_of_each_field() -> None:
    points = np.array([[0.1, 0.1], [0.5, 0.6], [2.2, 0.2], [0.9, 0.9]])
    cells, rows = look._nearest_to_centres(points)
    assert cells.tolist() == [[0, 0], [2, 0]] and rows.tolist() == [1, 2]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_map_is_drawn_of_two_images_already(tmp_path: Path, labelled: bool) -> None:
    write_images(tmp_path, ["a/0.png", "b/1.png"] if labelled else ["0.png", "1.png"], 32, 32)
    assert opened(look.feature_map(bank(tmp_path, [[1.0, 0.1], [0.1, 1.0]]))).shape == (800, 1600, 4)


def test_a_bank_needs_two_images_to_compare(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png"], 16, 24)
    with pytest.raises(UserError, match="has 1 images that can be read"):
        look.bank(run, str(tmp_path), 10)
