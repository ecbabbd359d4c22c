"""torchvision's named sets: small ones are written in their own layout, so that nothing is downloaded."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets  # type: ignore[import-untyped]

from mimae.data.loading.batch import DataError
from mimae.data.pixels.augment import Window
from mimae.data.pixels.decode import decode
from mimae.data.sources.open import open_source
from mimae.data.sources.torchvision_sets import SETS as LEGAL_SETS

SETS = {"train": 7, "test": 4}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a CIFAR10 of eleven images."""
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    listed = {}
    for split, count in SETS.items():
        values = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        data = pickle.dumps({"data": values, "labels": [i % 2 for i in range(count)]})
        (folder / split).write_bytes(data)
        listed[split] = [[split, hashlib.md5(data).hexdigest()]]
    meta = pickle.dumps({"label_names": ["cat", "dog"]})
    (folder / "meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", listed["train"])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", listed["test"])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    )
    return tmp_path


@pytest.mark.parametrize(("suffix", "split"), [("", "train"), (":train", "train"), (":test", "test")])
def test_images_and_classes(root: Path, suffix: str, split: str) -> None:
    source = open_source(f"torchvision:CIFAR10:{root}{suffix}")
    expected = datasets.CIFAR10(root, train=split == "train")
    assert len(source) == SETS[split] and source.classes == ["cat", "dog"]
    assert source.labels is not None and source.labels.tolist() == expected.targets
    for i in range(len(source)):
        pixels = decode(source.read(i), lambda h, w: Window(0, 0, h, w), (32, 32), max_pixels=1024)
        np.testing.assert_array_equal(pixels, expected.data[i])
    assert source.path(2) == f"torchvision:CIFAR10:{root}{suffix}, item 2"
    with pytest.raises(IndexError):
        source.read(len(source))


def test_fingerprint_is_of_the_set_and_not_of_the_place(root: Path, tmp_path: Path) -> None:
    moved = root / "copy"
    moved.mkdir()
    (moved / datasets.CIFAR10.base_folder).symlink_to(root / datasets.CIFAR10.base_folder)
    names = [f"torchvision:CIFAR10:{place}" for place in (root, moved, f"{root}:train", f"{root}:test")]
    prints = [open_source(name).fingerprint for name in names]
    assert prints[0] == prints[1] == prints[2] != prints[3]


class Named:
    """A set that lists its files and has boxes instead of classes."""

    def __init__(self, root: str, split: str = "train+unlabeled") -> None:
        self.root = root
        self.samples = [(str(path), 0) for path in sorted(Path(root).iterdir())]
        self.targets = ["boxes.xml"] * len(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> None: ...


def test_files_that_a_set_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "STL10", Named)
    for name in ("a/1.png", "b/1.png", "c/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    places = ["a", "b", "c", "a:train+unlabeled", "a:train-standard"]
    sources = [open_source(f"torchvision:STL10:{place}", tmp_path) for place in places]
    assert all(source.labels is None for source in sources)
    prints = [source.fingerprint for source in sources]
    assert prints[0] == prints[1] == prints[3] and len(set(prints)) == 3


def test_set_that_needs_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(root: str) -> None:
        raise ImportError("No module named 'av'")

    monkeypatch.setattr(make, "__getitem__", None, raising=False)
    monkeypatch.setattr(datasets, "PCAM", make)
    with pytest.raises(DataError, match="PCAM needs a package that is not installed: No module named 'av'"):
        open_source("torchvision:PCAM:x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:CIFAR10", "legal is torchvision:NAME:ROOT or"),
        ("torchvision:CIFAR11:x", "CIFAR11 is not a set of torchvision; legal are .*CIFAR10, "),
        ("torchvision:LSUN:.", "LSUN may execute code from a file; legal are"),
        ("torchvision:DatasetFolder:.", "DatasetFolder may execute code"),
        ("torchvision:CIFAR10:nowhere", r"cannot open CIFAR10 under nowhere .*download=True"),
        ("torchvision:CIFAR10:x:val", "CIFAR10 has no part 'val'; legal is train or test"),
        ("torchvision:SVHN:x:val", "cannot open SVHN under x"),
    ],
)
def test_sets_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(name)


def test_no_legal_set_unpickles_what_it_has_not_verified() -> None:
    """The source code of the sets shows it. CIFAR's batches must have the checksums that torchvision knows."""
    for name in LEGAL_SETS.intersection(datasets.__all__):
        sources = {inspect.getsource(inspect.getmodule(base)) for base in getattr(datasets, name).__mro__[:-1]}  # type: ignore[arg-type]
        for source in sources:
            lines = source.splitlines() if "pickle.load" in source or "torch.load" in source else []
            loads = [line for line in lines if ("pickle.load" in line or "torch.load" in line)]
            assert all("weights_only=True" in line or name.startswith("CIFAR") for line in loads), name
            assert "allow_pickle" not in source, name


def test_a_batch_with_another_checksum_is_not_unpickled(root: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (root / "ran",)

    (root / datasets.CIFAR10.base_folder / "train").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="cannot open CIFAR10"):
        open_source(f"torchvision:CIFAR10:{root}")
    assert not (root / "ran").exists()


def test_item_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"torchvision:CIFAR10:{root}")

    def broken(self: object, i: int) -> None:
        raise SyntaxError("broken\nPNG file")

    monkeypatch.setattr(datasets.CIFAR10, "__getitem__", broken)
    with pytest.raises(OSError, match=r"^SyntaxError: broken PNG file$"):
        source.read(0)
