"""Which kind of source a data path names, and the source itself."""

from __future__ import annotations

from pathlib import Path

from mimae.data.loading.batch import DataError
from mimae.data.sources import photos
from mimae.data.sources.base import Source
from mimae.data.sources.files import LIST_EXTENSIONS, FileSource, read_list, scan_folder
from mimae.data.sources.index import indexed
from mimae.data.sources.mixture import EXTENSIONS as MIXTURES
from mimae.data.sources.mixture import read_mixture
from mimae.data.sources.parquet import ParquetSource, read_footers
from mimae.data.sources.patterns import SHARDS, is_pattern, matching, shard_files
from mimae.data.sources.shards import ShardSource, read_headers
from mimae.data.sources.torchvision_sets import PREFIX, TorchvisionSource

LEGAL = (
    f"A data path is a folder of images, a list file ({', '.join(LIST_EXTENSIONS)}), tar shards or Parquet files "
    f"(one, a folder of them, or a pattern as train-{{000..099}}.tar or train-*.tar), a mixture (.yaml), "
    f"torchvision:NAME:ROOT, or one of the embedded sets {', '.join(photos.SPLITS)}."
)


def open_source(path: str, folder: Path = Path()) -> Source:
    """The source that `path`, relative to `folder`, names; docs/data.md has the forms. Raises DataError.

    Embedded sets are called by their names, a folder called so ./photos.
    """
    if path.startswith(PREFIX):
        return TorchvisionSource(path, folder)
    place = photos.folder(path) if path in photos.SPLITS else (folder / Path(path).expanduser()).absolute()
    if place.is_dir():
        if shards := shard_files(place):
            return _open_shards(path, shards)
        return FileSource(path, place, indexed([place], lambda: scan_folder(place)))
    if place.is_file() and place.suffix.lower() in LIST_EXTENSIONS:
        return FileSource(path, place.parent, indexed([place], lambda: read_list(place)))
    if place.is_file() and place.suffix.lower() in MIXTURES:
        return read_mixture(path, place, open_source)
    if place.is_file() and place.suffix.lower() in SHARDS:
        return _open_shards(path, [place])
    if place.exists():
        raise DataError(f"{place} is none of these. {LEGAL}")
    given = str(Path(path).expanduser())
    if is_pattern(given):
        return _open_shards(path, matching(given, folder.absolute()))
    parent = next(p for p in place.parents if p.exists())
    raise DataError(f"{place} does not exist ({parent} is the part of it that does). {LEGAL}")


def _open_shards(name: str, shards: list[Path]) -> Source:
    if len(endings := sorted({shard.suffix.lower() for shard in shards})) > 1:
        raise DataError(f"{name} names files of several kinds, {' and '.join(endings)}; open one kind, or mix them")
    if endings[0] not in SHARDS:
        raise DataError(f"{name} names {shards[0]} and others of its kind. {LEGAL}")
    if endings == [".tar"]:
        return ShardSource(name, shards, indexed(shards, lambda: read_headers(shards)))
    return ParquetSource(name, shards, indexed(shards, lambda: read_footers(shards)))
