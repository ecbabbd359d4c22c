"""The protocol between `mimae predict` and a task: what is found in an image, where it is written, how it is drawn."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, TextIO, TypeVar

from PIL import Image
from torch import Tensor

from mimae.data.loading.batch import Batch
from mimae.data.loading.examples import Reader
from mimae.data.sources.base import Source
from mimae.errors import UserError
from mimae.outside.files import made_beside

F = TypeVar("F")
F_contra = TypeVar("F_contra", contravariant=True)


class Options(NamedTuple):
    """Options of `mimae predict` that only some tasks have; None: not given."""

    top: int | None = None
    """Number of classes of each image."""
    overlays: Path | None = None
    """Folder for a picture of each image with what was found in it."""


class Write(Protocol[F_contra]):
    """Writes what was found in sample `i`; None: the image cannot be read."""

    def __call__(self, i: int, found: F_contra | None) -> None: ...


class Predictor(ABC, Generic[F]):
    """A trained model in eval mode, used on one batch of images after the other."""

    out: ClassVar[str]
    """Kind of output that --out names, in words."""
    options: ClassVar[frozenset[str]] = frozenset()
    """The names of the `Options` that the task has."""
    batch: ClassVar[int] = 1
    """Images of a batch."""
    reader: Reader
    """Makes the examples, of images without labels."""

    @abstractmethod
    def find(self, batch: Batch) -> list[F]:
        """Return what is found in each image of a batch on the model's device."""

    @abstractmethod
    def writing(self, source: Source, out: Path) -> AbstractContextManager[Write[F]]:
        """Open the output for the images of a source. One image is in memory at a time."""

    def drawn(self, image: Tensor, found: F) -> Image.Image:
        """Return a picture of an image of a batch, uint8 (H, W, 3), with what was found in it.

        Only tasks whose `options` contain "overlays" have pictures.
        """
        raise TypeError(f"{type(self).__name__} draws no pictures")


@contextmanager
def whole_file(out: Path) -> Iterator[TextIO]:
    """Open a text file that gets its name when the block ends: before, and after an error, an old one stays.

    Raises OSError at once for a folder of that name.
    """
    if out.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(out))
    with made_beside(out) as temporary, temporary.open("x", encoding="utf-8", errors="surrogateescape") as file:
        yield file


def new_folder(option: str, folder: Path) -> None:
    """Make a folder. Raises UserError where it holds files, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{option} {folder}: there are files already; remove them, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)


class Names:
    """Paths of files that are written for the images of a source: those of the images below the source's folder, with
    another extension."""

    def __init__(self, source: Source) -> None:
        self._source, self._root = source, os.path.abspath(os.path.expanduser(source.name))
        self._taken: set[str] = set()

    def of(self, i: int, ending: str) -> str:
        """Return the path of sample i. Each sample may be asked for once: where two images differ by their extension
        alone, the second keeps its own in front of `ending`."""
        path = self._source.path(i)
        inside = os.path.abspath(path).startswith(self._root + os.sep)
        relative = os.path.relpath(path, self._root) if inside else path.rpartition("/")[2]
        # Names inside of archives are anybody's: no part may lead out of the folder.
        relative = os.sep.join(part for part in relative.split(os.sep) if part not in ("", ".", ".."))
        for name in (f"{os.path.splitext(relative)[0]}{ending}", f"{relative}{ending}", f"{relative}-{i}{ending}"):
            if name not in self._taken:
                break
        self._taken.add(name)
        return name
