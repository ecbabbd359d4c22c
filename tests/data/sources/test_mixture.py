"""Mixtures: several sources with consecutive ids, drawn from by weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimae.data.loading.batch import DataError
from mimae.data.loading.loader import make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources.mixture import apportion
from mimae.data.sources.open import open_source
from tests.data.conftest import write_images
from tests.data.sources.test_shards import write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, [f"photos/{name}.png" for name in ("a/1", "a/2", "b/3")])
    write_tar(tmp_path / "t-0.tar", [("x.png", b"x"), ("x.cls", b"1"), ("y.png", b"y"), ("y.cls", b"0")])
    return tmp_path


def mixture(folder: Path, text: str) -> str:
    path = folder / "mix.yaml"
    path.write_text(text)
    return str(path)


def test_sources_follow_one_another(folder: Path) -> None:
    source = open_source(mixture(folder, "draws: 10\nsources: {'t-{0..0}.tar': 3, ./photos: 1.0}"))
    assert len(source) == 5
    assert source.path(1) == f"{folder}/t-0.tar/y.png" and source.read(1) == b"y"
    assert [(share.samples, share.draws) for share in source.shares] == [(2, 8), (3, 2)]
    assert source.read(4) == (folder / "photos/b/3.png").read_bytes()
    assert source.labels is None  # The shards have class numbers and the folder has class names.
    for i in (-1, 5):
        with pytest.raises(IndexError):
            source.read(i)


def test_labels_where_all_sources_have_the_same_classes(folder: Path) -> None:
    shutil.copytree(folder / "photos", folder / "copy")
    source = open_source(mixture(folder, "draws: 4\nsources: {./photos: 1, copy: 1}"))
    assert source.classes == ["a", "b"]
    assert source.labels is not None and source.labels.tolist() == [0, 0, 1, 0, 0, 1]


def test_fingerprint_is_of_sources_and_draws(folder: Path) -> None:
    texts = ["draws: 8\nsources: {./photos: 1, t-0.tar: 1}", "draws: 8\nsources: {./photos: 3, t-0.tar: 1}"]
    prints = [open_source(mixture(folder, text)).fingerprint for text in (texts[0], texts[1], texts[0])]
    assert prints[0] == prints[2] != prints[1]


def test_sets_of_torchvision_lie_beside_the_file_too(folder: Path) -> None:
    with pytest.raises(DataError, match=f"cannot open CIFAR10 under {folder}/cifar"):
        open_source(mixture(folder, "draws: 4\nsources: {'torchvision:CIFAR10:cifar': 1}"))


def test_epochs_of_draws(folder: Path) -> None:
    """Six draws per epoch of three images: each twice, cropped differently each time. The next epoch continues."""
    path = mixture(folder, "draws: 9\nsources: {./photos: 2, photos/a: 1}")
    source = open_source(path)
    loader = make_loader(DataSettings(image_size=8, workers=0), source, seed=1, batch_size=3)
    assert loader.steps_per_epoch == 3
    counts = np.zeros(5, int)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        slots = np.concatenate([batch.sample_ids for batch in batches])
        real = np.concatenate([batch.source_ids for batch in batches])
        assert len(set(slots)) == 9 and (slots % 5 == real).all()
        pixels = {image.numpy().tobytes() for batch in batches for image in batch.images}
        assert len(pixels) == 9
        counts += np.bincount(real, minlength=5)
    assert counts.tolist() == [4, 4, 4, 3, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the mixture"),
        ("[1]", r"is not a mixture; an example of one is:\n  draws:"),
        ("sources: {a: 1}", "is not a mixture"),
        ("draws: 4\nsources: {a: 1}\nweights: 3", "is not a mixture"),
        ("draws: 0.5\nsources: {a: 1}", r"draws: 0.5 is not a number of samples"),
        ("draws: 4\nsources: [a, b]", "is not a list of `path: weight`"),
        ("draws: 4\nsources: {a: 0}", "the weight of a is 0; weights are numbers above 0"),
        ("draws: 4\nsources: {a: .inf}", "the weight of a is inf"),
        ("draws: 4\nsources: {a: 1.0e+308, b: 1.0e+308}", r"the weight of a is 1e\+308"),
        (f"draws: 1{400 * '0'}\nsources: {{a: 1}}", "is not a number of samples"),
        ("draws: 4\nsources: {a: yes}", "the weight of a is True"),
        ("draws: 4\nsources: {a: 1, b: 1000}", "none of 4 draws is for a"),
        ("draws: 4\nsources: {nowhere: 1}", "nowhere does not exist"),
        ("draws: 4\nsources: {mix.yaml: 1}", "a mixture cannot contain other mixtures"),
        ("draws: 4\nsources: {? [a, b] : 1}", "line 2: a source is one path, not a list or a mapping"),
        ("draws: 4\nsources: {inner.yaml: 1}", "a mixture cannot contain other mixtures"),
    ],
)
def test_mixtures_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    (folder / "inner.yaml").write_text("draws: 1\nsources: {./photos: 1}")
    with pytest.raises(DataError, match=message):
        open_source(mixture(folder, text))


@given(st.integers(1, 10_000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_shares_add_up(total: int, weights: list[float]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    assert all(abs(share - total * w / sum(weights)) < 1 for share, w in zip(shares, weights))


@pytest.mark.parametrize("second", ["./photos", "photos/", "photos/../photos", "link"])
def test_a_source_that_is_named_twice(folder: Path, second: str) -> None:
    (folder / "link").symlink_to("photos")
    text = f"draws: 8\nsources:\n  ./photos: 1\n  t-0.tar: 1\n  {second}: 3\n"
    with pytest.raises(DataError, match=rf"{second} \(line 5\) is the same source as ./photos \(line 3\)"):
        open_source(mixture(folder, text))
    with pytest.raises(DataError, match="line 3: draws is given twice"):
        open_source(mixture(folder, "draws: 8\nsources: {./photos: 1}\ndraws: 9\n"))


def test_a_mixture_of_an_earlier_run_keeps_its_meaning(folder: Path) -> None:
    """In version 1 the last weight of a path counts, and a folder name that looks like a number is a number."""
    write_images(folder, ["8/1.png", "00010/2.png", "00010/3.png"])
    first = DataSettings(index_version=1)
    path = mixture(folder, "draws: 8\nsources:\n  ./photos: 1\n  00010: 1\n  ./photos: 3\n")
    old = open_source(path, settings=first)
    assert [(share.samples, share.draws) for share in old.shares] == [(3, 6), (1, 2)]
    assert old.path(3) == f"{folder}/8/1.png"


def test_a_folder_is_called_as_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(folder, ["00010/2.png", "yes/3.png", "2020-01-01/4.png"])
    monkeypatch.setenv("HERE", str(folder))
    source = open_source(mixture(folder, "draws: 8\nsources: {00010: 1, yes: 1, 2020-01-01: 1, $HERE/photos: 1}"))
    assert [source.path(i) for i in range(3)] == [f"{folder}/{n}.png" for n in ("00010/2", "yes/3", "2020-01-01/4")]
    with pytest.raises(DataError, match="line 1: \\$NOWHERE: the environment variable NOWHERE is not set"):
        open_source(mixture(folder, "{draws: 8, sources: {$NOWHERE: 1}}"))


def test_notes_of_the_sources_are_those_of_the_mixture(folder: Path) -> None:
    (folder / "photos/notes.txt").touch()
    notes = open_source(mixture(folder, "draws: 4\nsources: {./photos: 1, t-0.tar: 1}")).notes
    assert notes == (
        "./photos: left out, since their extensions are not those of images: 1 .txt",
        "no sample has a class, since not all sources have the same ones",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "b: [" + "*a," * 2000 + "]", "22,0"),
        ("draws: &a [*a]", "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("#" * 100_000, "more than 65,536 bytes"),
    ],
)
def test_mixtures_that_would_exhaust_a_reader(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(mixture(folder, text))
    (folder / "mix.yaml").write_bytes("draws: 1".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        open_source(str(folder / "mix.yaml"))
