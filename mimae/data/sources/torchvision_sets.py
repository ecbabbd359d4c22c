"""torchvision's named data sets, stored locally: torchvision:NAME:ROOT or torchvision:NAME:ROOT:SPLIT."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mimae.data.loading.batch import DataError
from mimae.data.loading.order import Share
from mimae.data.sources.index import IndexedSource
from mimae.outside.paths import user_path

PREFIX = "torchvision:"
_FORM = re.compile(PREFIX + r"(\w+):(.+?)(?::([\w+-]+))?")
SETS: frozenset[str] = frozenset(
    (
        *("CIFAR10", "CIFAR100", "CLEVRClassification", "Caltech101", "Caltech256", "CelebA", "Cityscapes"),
        *("Country211", "DTD", "EMNIST", "EuroSAT", "FER2013", "FGVCAircraft", "FashionMNIST", "Flickr30k", "Flickr8k"),
        *("Flowers102", "Food101", "GTSRB", "INaturalist", "ImageFolder", "ImageNet", "Imagenette", "KMNIST", "Kitti"),
        *("LFWPeople", "MNIST", "Omniglot", "OxfordIIITPet", "PCAM", "Places365", "QMNIST", "RenderedSST2", "SBU"),
        *("SEMEION", "STL10", "SUN397", "SVHN", "StanfordCars", "USPS", "VOCDetection", "VOCSegmentation", "WIDERFace"),
    )
)
"""Sets that do not execute code from files: they only unpickle files whose checksums torchvision knows, or use
`torch.load(..., weights_only=True)`. LSUN, for example, is missing: it unpickles a file in the working directory."""

_LABELS = ("targets", "labels", "_labels")
_FILES = ("samples", "imgs", "_samples")


class TorchvisionSource:
    """A torchvision data set of images and classes. It returns decoded images, which are encoded again losslessly."""

    def __init__(self, name: str, folder: Path = Path()) -> None:
        self.name = name
        self._data, self._split = _open(name, folder)

    @cached_property
    def labels(self) -> np.ndarray | None:
        found = [getattr(self._data, name) for name in _LABELS if hasattr(self._data, name)]
        try:
            labels = np.asarray(found[0], np.int64) if found else None
        except (ValueError, TypeError):  # Boxes, segmentations, captions.
            return None
        # Some sets mark samples without a class by -1.
        return labels if labels is not None and labels.ndim == 1 and (labels >= 0).all() else None

    @property
    def classes(self) -> list[str] | None:
        classes = getattr(self._data, "classes", None)
        return list(classes) if self.labels is not None and classes and isinstance(classes[0], str) else None

    @property
    def shares(self) -> tuple[Share, ...]:
        blocks = np.append(np.arange(0, len(self), IndexedSource.RUN), len(self))
        return (Share(len(self), len(self), blocks),)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def fingerprint(self) -> str:
        _, name, _ = _parts(self.name)
        digest = hashlib.sha256(f"{name} {self._split} {len(self)}".encode())
        for file in _files(self._data):
            digest.update(file + b"\0")
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._data)

    def path(self, i: int) -> str:
        return f"{self.name}, item {i}"

    def read(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        file = io.BytesIO()
        try:
            self._data[i][0].save(file, "PNG", compress_level=1)
        except Exception as error:  # A damaged file of the set can raise any exception.
            raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error
        return file.getvalue()


def _files(data: Any) -> Iterator[bytes]:
    """Yield the paths of a set's images, relative to its folder, if the set has a list of (path, class)."""
    root = os.fsencode(getattr(data, "root", ""))
    for sample in next((getattr(data, name) for name in _FILES if hasattr(data, name)), ()):
        if isinstance(sample, tuple) and isinstance(sample[0], str | Path):
            yield os.fsencode(sample[0]).removeprefix(root)


def _open(name: str, folder: Path) -> tuple[Any, str]:
    """Return the set and a description of its split, including one that is torchvision's default."""
    from torchvision import datasets  # type: ignore[import-untyped]

    place, kind, split = _parts(name)
    root = user_path(place, folder)
    known = [each for each in datasets.__all__ if each in SETS]
    if kind not in known:
        why = "may execute code from a file" if kind in datasets.__all__ else "is not a set of torchvision"
        raise DataError(f"{name}: {kind} {why}; legal are {', '.join(sorted(known))}")
    make = getattr(datasets, kind)
    takes = inspect.signature(make).parameters
    options: dict[str, Any] = {"train": split != "test"} if "train" in takes else {}
    if "split" in takes and split is not None:
        options = {"split": split}
    elif split not in (None, "train", "test") or (split is not None and not options):
        raise DataError(f"{name}: {kind} has no part {split!r}; legal is {'train or test' if options else 'none'}")
    part = inspect.signature(make).bind_partial(**options)
    part.apply_defaults()
    try:
        return make(str(root), **options), str({key: part.arguments.get(key) for key in ("train", "split")})
    except ImportError as error:
        raise DataError(f"{name}: torchvision's {kind} needs a package that is not installed: {error}") from error
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{name}: torchvision cannot open {kind} under {root} ({' '.join(str(error).split())}). "
            f"The set must exist there, in torchvision's own layout: torchvision.datasets.{kind}(..., download=True)"
        ) from error


def moved(name: str, folder: Path) -> str:
    """Return the name of the same set with an absolute ROOT. A relative ROOT is relative to `folder`."""
    place, kind, split = _parts(name)
    return f"{PREFIX}{kind}:{user_path(place, folder).absolute()}" + (f":{split}" if split else "")


def _parts(name: str) -> tuple[str, str, str | None]:
    """Split torchvision:NAME:ROOT[:SPLIT] into (root, name, split). Raises DataError."""
    match = _FORM.fullmatch(name)
    if match is None:
        raise DataError(
            f"{name}: legal is torchvision:NAME:ROOT or torchvision:NAME:ROOT:SPLIT, e.g. torchvision:CIFAR10:data"
        )
    return match[2], match[1], match[3]
