"""The embedded photographs: cropped once, from two parts that share no pixel, and read like any folder."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimae.data.loading.batch import DataError
from mimae.data.sources import photos
from mimae.data.sources.open import open_source


def original(file: str) -> np.ndarray:
    found = importlib.util.find_spec("skimage")
    assert found is not None and found.submodule_search_locations
    return np.asarray(Image.open(Path(found.submodule_search_locations[0]) / "data" / file))


def places(photograph: np.ndarray, crop: np.ndarray) -> list[tuple[int, int]]:
    """Return every (top, left) at which the photograph contains the crop."""
    h, w = crop.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(photograph[: -h + 1 or None], w, 1)
    # Compare the first row of the crop first: it excludes nearly every position.
    row = np.moveaxis(crop[0], 0, -1)
    candidates = np.argwhere((windows == row).reshape(*windows.shape[:2], -1).all(-1))
    return [(y, x) for y, x in candidates.tolist() if (photograph[y : y + h, x : x + w] == crop).all()]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Use only a colour photograph and the grey one with the smallest height, so that the test is fast."""
    few = {"chelsea": "chelsea.png", "text": "text.png"}
    monkeypatch.setattr(photos, "PHOTOGRAPHS", few)
    return few


def test_crops_of_the_two_sets(two: dict[str, str], cache: Path) -> None:
    train, test = open_source("photos"), open_source("photos-test")
    assert (len(train), len(test)) == (800, 200)
    assert train.classes == test.classes == ["chelsea", "text"]
    assert train.labels is not None and np.bincount(train.labels).tolist() == [400, 400]
    assert test.labels is not None and np.bincount(test.labels).tolist() == [100, 100]
    assert (train.name, test.name) == ("photos", "photos-test")
    sides = set()
    for source, (low, high) in ((train, (0.0, 0.6)), (test, (0.6, 1.0))):
        for i in range(0, len(source), len(source) // 8):
            crop = np.asarray(Image.open(source.path(i)))
            photograph = original(two[Path(source.path(i)).parent.name])
            assert crop.ndim == photograph.ndim  # Grey images stay grey: a loader has to handle them.
            sides.add(crop.shape[:2])
            width = photograph.shape[1]
            assert any(
                int(low * width) <= x and x + crop.shape[1] <= int(high * width) for _, x in places(photograph, crop)
            )
    assert all(h == w and 40 <= h <= 100 for h, w in sides) and len(sides) > 8
    assert [path.name for path in cache.iterdir() if path.name.startswith("photos")] == ["photos-v1"]


def test_known_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crops are frozen, because results on them are compared across versions.

    The tested photographs are the first ones, so their ids are those of the full set.
    """
    monkeypatch.setattr(photos, "PHOTOGRAPHS", {"astronaut": "astronaut.png"})
    for name, shape, place in (("photos", (96, 96, 3), (96, 105)), ("photos-test", (48, 48, 3), (279, 357))):
        crop = np.asarray(Image.open(open_source(name).path(7)))
        assert crop.shape == shape
        assert places(original("astronaut.png"), crop) == [place]


def test_they_are_written_once(two: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source("photos").fingerprint
    monkeypatch.setattr(photos, "PHOTOGRAPHS", {"gone": "gone.png"})
    assert open_source("photos").fingerprint == first


def test_processes_that_write_them_at_once(two: dict[str, str], cache: Path) -> None:
    """Both processes find a complete set, and neither leaves temporary files."""
    found: list[int] = []
    start = threading.Barrier(2)

    def write() -> None:
        start.wait()
        found.append(len(list(photos.folder("photos").rglob("*.png"))))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [800, 800]
    assert [path.name for path in cache.iterdir()] == ["photos-v1"]


def test_installed_wheel_carries_every_photograph() -> None:
    """There are sixteen classes without a download, also if the constraints are raised to a newer scikit-image."""
    assert len(photos.PHOTOGRAPHS) == 16
    for file in photos.PHOTOGRAPHS.values():
        height, width = original(file).shape[:2]
        assert height >= 100 and width * 4 // 10 >= 100  # The narrower part has room for the largest crop.


def test_photograph_that_is_not_carried(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "PHOTOGRAPHS", {"text": "text.png", "skin": "skin.jpg"})
    with pytest.raises(DataError, match=r"has no skin.jpg"):
        open_source("photos")
    assert list(cache.iterdir()) == []  # No unfinished set is left that the next run could use.


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the embedded photographs.*Set XDG_CACHE_HOME"):
        open_source("photos")
