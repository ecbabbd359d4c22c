"""Opening of data paths: decide which kind of source a path names, and open it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.sources import lists, photos
from mimae.data.sources.base import Source
from mimae.data.sources.endings import listed
from mimae.data.sources.files import FileSource, beside_shards, scan_folder
from mimae.data.sources.index import indexed
from mimae.data.sources.mixture import EXTENSIONS as MIXTURES
from mimae.data.sources.mixture import read_mixture
from mimae.data.sources.parquet import ParquetSource, read_footers
from mimae.data.sources.patterns import SHARDS, is_pattern, matching, shards_in
from mimae.data.sources.shards import ShardSource, read_headers
from mimae.data.sources.splits import Use, by_split, choose
from mimae.data.sources.subset import subset_of
from mimae.data.sources.torchvision_sets import PREFIX, TorchvisionSource, moved
from mimae.outside.paths import user_path
from mimae.outside.text import printable

LEGAL = (
    f"A data path is a folder of images, a list file ({', '.join(lists.EXTENSIONS)}), tar shards or Parquet files "
    f"(one, a folder of them, or a pattern such as train-{{000..099}}.tar or train-*.tar), a mixture (.yaml), "
    f"torchvision:NAME:ROOT, or one of the embedded sets {', '.join(photos.SPLITS)}."
)

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://|(pipe|hf|s3|gs|az|http|https):", re.IGNORECASE)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def open_source(
    path: str, folder: Path = Path(), settings: DataSettings | None = None, use: Use = "training"
) -> Source:
    """Open the source at `path`, which is relative to `folder`; docs/data.md lists the forms. Raises DataError.

    The name of an embedded set means that set; write ./photos for a folder of that name. If a folder contains several
    splits, `use` selects one. Training images are those of `settings.subset`.
    """
    settings = settings or DataSettings()
    whole = settings.model_copy(update={"subset": None})
    source = _open(path, folder, whole, use)
    return subset_of(source, settings.subset) if use == "training" else source


def _open(path: str, folder: Path, settings: DataSettings, use: Use) -> Source:
    if path.startswith(PREFIX):
        return TorchvisionSource(path, folder)
    try:
        place = photos.folder(path) if path in photos.SPLITS else user_path(path, folder).absolute()
        kind = "folder" if place.is_dir() else "file" if place.is_file() else "other" if place.exists() else ""
    except (OSError, ValueError) as error:  # The name is too long, or has a zero byte.
        if not is_pattern(path):  # A pattern may be longer than the names that it stands for.
            raise DataError(f"{printable(path[:200])} is not a path ({error_text(error)}). {LEGAL}") from error
        place, kind = folder / path, ""
    ending = place.suffix.lower()
    if kind == "folder":
        return _open_folder(path, place, settings, use)
    if kind == "file" and ending in lists.EXTENSIONS:
        index = indexed([place], str(settings.index_version), lambda: lists.read_list(place))
        return FileSource(path, place.parent, index, settings.max_bytes)
    if kind == "file" and ending in MIXTURES:
        return read_mixture(path, place, partial(_open, settings=settings, use=use), settings.index_version)
    if kind == "file" and ending in SHARDS:
        return _open_shards(path, [place], settings)
    if kind:
        raise DataError(
            f"{printable(str(place))} is none of the supported kinds. {_advice(path, place, folder)}{LEGAL}"
        )
    given = str(user_path(path))
    if is_pattern(given) and not _is_address(path, folder):
        return _open_pattern(path, given, folder, settings)
    parent = next(p for p in place.parents if p.exists())
    raise DataError(
        f"{printable(str(place))} does not exist ({printable(str(parent))} is the part of it that exists). "
        f"{_advice(path, place, folder)}{LEGAL}"
    )


def absolute_path(path: str, folder: Path = Path()) -> str:
    """Return a data path that names the same source from any working directory; `path` is relative to `folder`."""
    if path in photos.SPLITS or _is_address(path, folder):
        return path
    return moved(path, folder) if path.startswith(PREFIX) else str(user_path(path, folder).absolute())


def _is_address(path: str, folder: Path) -> bool:
    return bool(_ADDRESS.match(path)) and not os.path.lexists(folder / path)


def error_text(error: Exception) -> str:
    """Return the message of a system error as one printable line."""
    return printable((error.strerror if isinstance(error, OSError) else None) or str(error))


def _advice(path: str, place: Path, folder: Path) -> str:
    """Return advice on what to write instead of a path that cannot be opened; "" if there is none."""
    if _is_address(path, folder):
        return "It is a URL, but mimae reads local files: download the data, or mount their storage. "
    if "::" in path:
        return "`::` joins shards in other loaders; here use a pattern, such as {a,b}.tar, or a mixture. "
    if place.suffix.lower() in _COMPRESSED:
        return "A compressed file does not allow random access: unpack it, for example a .tar.gz to a .tar. "
    for separator, word in ((" ", "spaces"), (",", "commas"), (";", "semicolons"), (":", "colons")):
        if separator in path and any(os.path.exists(user_path(each.strip(), folder)) for each in path.split(separator)):
            return f"It was read as one path that contains {word}; to use several sources, write a mixture. "
    return ""


def _open_pattern(path: str, pattern: str, folder: Path, settings: DataSettings) -> Source:
    """Open the shards that a pattern matches; `path` is the pattern as the user wrote it."""
    shards = matching(pattern, folder.absolute())
    if other := [shard for shard in shards if shard.suffix.lower() not in SHARDS]:
        advice = _advice(path, other[0], folder)
        raise DataError(f"{printable(path)} matches {printable(str(other[0]))}, which is not a shard. {advice}{LEGAL}")
    groups = by_split([shard.name for shard in shards]) if settings.index_version > 1 else {}
    notes = []
    if groups:
        named = ", ".join(map(str, groups))
        notes.append(f"the pattern matches files of several splits, and all are used: {named}")
    if "**" in pattern:
        notes.append("** in a pattern stands for the names of one level of folders, as * does")
    return _open_shards(path, shards, settings, notes)


def _open_folder(name: str, place: Path, settings: DataSettings, use: Use) -> Source:
    """Open the images or the shards in a folder."""
    version = settings.index_version
    shards = shards_in(place, version)
    if version == 1:
        return _open_shards(name, shards, settings) if shards else _open_images(name, place, settings)
    if not shards:
        return _one_split(name, place, _open_images(name, place, settings), settings, use)
    notes = beside_shards(place, version)
    if groups := by_split([shard.name for shard in shards]):
        chosen, note = choose(str(place), groups, use)
        shards, notes = [place / each for each in chosen], [note, *notes]
    return _open_shards(name, shards, settings, notes)


def _open_images(name: str, place: Path, settings: DataSettings) -> FileSource:
    version = settings.index_version
    index = indexed([place], str(version), lambda: scan_folder(place, version))
    return FileSource(name, place, index, settings.max_bytes)


def _one_split(name: str, place: Path, source: FileSource, settings: DataSettings, use: Use) -> Source:
    """Return `source`, or the source of one split if the folders that it treats as classes are splits."""
    groups = by_split(source.classes or [])
    if not groups or None in groups or any(len(names) > 1 for names in groups.values()):
        return source
    chosen, note = choose(str(place), groups, use)
    one = _open_images(name, place / chosen[0], settings)
    one.index.notes.insert(0, note)
    return one


def _open_shards(name: str, shards: list[Path], settings: DataSettings, notes: Sequence[str] = ()) -> Source:
    """Open shards that have been found."""
    kinds = {ending: [shard for shard in shards if shard.suffix.lower() == ending] for ending in SHARDS}
    if all(kinds.values()):
        found = " and ".join(f"{len(files):,} {ending} ({listed([files[0].name])})" for ending, files in kinds.items())
        folders = {shard.parent for shard in shards}
        place = folders.pop() if len(folders) == 1 else Path("FOLDER")
        raise DataError(
            f"{printable(name)} has files of several kinds, {found}; open one kind, as {printable(str(place))}/*.tar "
            f"(img2dataset stores images in .tar and metadata in .parquet), or use a mixture"
        )
    rules = f"{settings.index_version} {settings.image_key!r} {settings.label_key!r}"
    source: ShardSource | ParquetSource
    if kinds[".tar"]:
        source = ShardSource(name, shards, indexed(shards, rules, lambda: read_headers(shards, settings)), settings)
    else:
        source = ParquetSource(name, shards, indexed(shards, rules, lambda: read_footers(shards, settings)), settings)
    source.index.notes[:0] = notes
    return source
