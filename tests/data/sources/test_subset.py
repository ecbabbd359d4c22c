"""Parts of a data set: shares, numbers and lists of names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mimae.data.loading.batch import DataError
from mimae.data.loading.loader import make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from tests.data.conftest import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 images of class a, 30 of b, 5 of c."""
    folder = tmp_path_factory.mktemp("subset")
    for name, count in {"a": 15, "b": 30, "c": 5}.items():
        write_images(folder / name, [f"{i}.png" for i in range(count)])
    return folder


def opened(images: Path, subset: str | None, use: str = "training") -> Source:
    settings = DataSettings(image_size=8, subset=subset, workers=0, loader="torch")
    return open_source(str(images), settings=settings, use=use)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("subset", "counts"), [("24%", [4, 4, 4]), ("20", [8, 7, 5]), ("100%", [15, 30, 5]), ("1", [1, 0, 0]), ("2%", None)]
)
def test_classes_have_equal_shares_where_they_have_enough(images: Path, subset: str, counts: list[int] | None) -> None:
    source = opened(images, subset)
    assert source.labels is not None
    found = np.bincount(source.labels, minlength=3)
    assert sorted(found) == sorted(counts) if counts else len(source) == 1
    assert source.classes == ["a", "b", "c"]
    assert [source.path(i) for i in range(len(source))] == sorted({source.path(i) for i in range(len(source))})
    assert source.fingerprint == opened(images, subset).fingerprint
    assert any(f"data.subset={subset}" in note for note in source.notes)


def test_held_out_images_are_all_used(images: Path) -> None:
    assert len(opened(images, "10%", "held-out")) == 50


def test_a_list_names_images_by_the_end_of_their_paths(images: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("b/29.png\n a/2.png\n\nb/29.png\n20.png\n")
    source = opened(images, str(names))
    assert [source.path(i).removeprefix(f"{images}/") for i in range(3)] == ["a/2.png", "b/20.png", "b/29.png"]
    assert len(source) == 3 and source.labels is not None and source.labels.tolist() == [0, 1, 1]
    assert source.read(0) == (images / "a/2.png").read_bytes()


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_a_loader_reads_the_subset_alone(images: Path, shuffle: str) -> None:
    settings = DataSettings(image_size=8, subset="24%", workers=0, loader="torch", shuffle=shuffle)  # type: ignore[arg-type]
    loader = make_loader(settings, open_source(str(images), settings=settings), seed=0, batch_size=4)
    assert sorted(torch_id for batch in loader.epoch(0) for torch_id in batch.source_ids.tolist()) == list(range(12))
    loader.close()


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("0%", "legal is a share above 0 %"),
        ("101%", "at most 100 %"),
        ("51", "a number of images from 1 to 50"),
        ("0", "a number of images from 1 to 50"),
        ("ten", "a share, as 10%, a number of images, or a list"),
        ("~nobody-has-this-name/a.txt", "data.subset=~nobody-has-this-name/a.txt: No such file"),
    ],
)
def test_what_is_no_part_is_refused(images: Path, subset: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(images, subset)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("3.png", "3.png is the name of 3 images"),
        ("a/99.png\nb/1.png", "1 of 2 names are not in"),
        ("\n", "names no image"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(images: Path, tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        opened(images, str(tmp_path / "names.txt"))


def test_a_list_that_is_no_text_file_is_refused(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "names.txt")
    with pytest.raises(DataError, match="it is not a regular file; legal is a share"):
        opened(images, str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").unlink()
    (tmp_path / "names.txt").write_bytes(b"a/1.png\n\xff")
    with pytest.raises(DataError, match="byte 8 is not UTF-8"):
        opened(images, str(tmp_path / "names.txt"))


def test_a_mixture_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(f"draws: 10\nsources:\n  {images}/a: 1\n  {images}/b: 1\n")
    settings = DataSettings(subset="10%")
    with pytest.raises(DataError, match="is a mixture"):
        open_source(str(tmp_path / "two.yaml"), settings=settings)
