"""A checkpoint's tensors in the format of torch.distributed.checkpoint (DCP): each rank writes and reads its parts.

DCP stores boxes of a tensor. A part is a range of its elements, and so consists of a few boxes. Any engine on any
number of ranks can read a checkpoint that another engine wrote, and so can DCP's own tools. DCP's `.metadata` is a
pickle; only descriptions of tensors are unpickled from it. The tensors are loaded with weights_only.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import pickletools
import re
import stat
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future
from torch.utils.dlpack import from_dlpack

from mimae.checkpoints.contents import is_inside
from mimae.distributed import Group
from mimae.errors import CheckpointError
from mimae.outside.files import Folder
from mimae.outside.text import printable
from mimae.randomness import Part

State = Mapping[str, "Tensor | Part"]
"""This rank's tensors and parts, by name. Whole tensors are equal on every rank."""

_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""Names that a `.metadata` may use, by module."""

_DESCRIPTION_BYTES = 1 << 30
"""Largest size in bytes of a `.metadata`; hundreds of ranks with a million pieces of tensors need much less."""

_SHORTAGE = re.compile(r"allocate memory|out of memory", re.IGNORECASE)


def boxes(start: int, length: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of the boxes that contain elements start .. start + length - 1 of a tensor, in order."""
    if not shape:
        yield from [((), ())] * length
        return
    inner = math.prod(shape[1:])
    while length:
        row, column = divmod(start, inner)
        rows = 0 if column else length // inner
        if rows:
            taken = rows * inner
            yield (row, *[0] * len(shape[1:])), (rows, *shape[1:])
        else:
            taken = min(length, inner - column)
            for offsets, sizes in boxes(column, taken, shape[1:]):
                yield (row, *offsets), (1, *sizes)
        start, length = start + taken, length - taken


def save(path: Path, state: State, group: Group, staging: Staging | None) -> None:
    """Write the state of all ranks of `group` into the directory `path`. Tensors that several ranks have are written
    once.

    A collective. With `staging`, this rank's tensors are copied there first. Raises CheckpointException on every rank.
    """
    path.mkdir(exist_ok=True)
    dcp.save(dict(state), storage_writer=_Writer(path), planner=_SavePlanner(staging), process_group=group)


def load(path: Path | Reader, state: State) -> None:
    """Read the tensors of `state` from `path`, in place.

    Raises CheckpointError for tensors that are missing or have other shapes, and for a broken description.
    """
    reader = path if isinstance(path, Reader) else Reader(path)
    missing = sorted(state.keys() - reader.described.state_dict_metadata.keys())
    if missing:
        more = " and others" if len(missing) > 3 else ""
        raise CheckpointError(f"{reader.path} lacks {', '.join(missing[:3])}{more}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # Each rank reads by itself.
        try:
            dcp.load(dict(state), storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
        except CheckpointException as error:
            cause = next((cause for cause, _ in error.failures.values()), error)
            if isinstance(cause, MemoryError) or _SHORTAGE.search(str(cause)):
                raise cause from None
            text = printable(" ".join(str(cause).split()))[:300]
            raise CheckpointError(f"{reader.path} cannot be loaded: {text}") from error


def load_whole(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the whole tensors whose names begin with `prefix`, by name without the prefix. Raises CheckpointError."""
    reader = Reader(path)
    state = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in reader.described.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(of, TensorStorageMetadata)
    }
    load(reader, state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def num_bytes(state: State) -> int:
    """Return the number of bytes of the whole tensors."""
    return sum(
        of.shape.numel() * of.values.element_size() if isinstance(of, Part) else of.nbytes for of in state.values()
    )


def reason(error: BaseException) -> str:
    """Return the first cause of DCP's exception, which contains the errors and tracebacks of every rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause}"
    return str(error)


class Staging:
    """Host copies of the tensors that this rank writes, made while it computes. The next save reuses their memory."""

    def __init__(self, device: torch.device) -> None:
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done = threading.Event()
        self._done.set()

    def begin(self) -> None:
        """Order the copies after all work that is queued on the device."""
        self._done.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, pieces: Mapping[MetadataIndex, Tensor]) -> dict[MetadataIndex, Tensor]:
        """Return copies of `pieces`. After the call, `pieces` may change."""
        with torch.cuda.stream(self._stream):
            for index, piece in pieces.items():
                if index not in self._buffers:
                    pinned = self._stream is not None
                    self._buffers[index] = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=pinned)
                self._buffers[index].copy_(piece, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        self.end()
        return {index: self._buffers[index] for index in pieces}

    def end(self) -> None:
        """Declare that nothing is left to copy."""
        self._done.set()

    @property
    def is_settled(self) -> bool:
        """Return whether `settle` would return at once."""
        return self._done.is_set()

    def settle(self) -> None:
        """Wait until the tensors that are being copied may change."""
        self._done.wait()


def _pieces(name: str, held: Tensor | Part) -> Iterator[tuple[ChunkStorageMetadata, MetadataIndex, Tensor]]:
    """Yield the boxes of this rank's part of a tensor, with their indices and views of their elements."""
    values, start, shape = held if isinstance(held, Part) else Part(held, 0, held.shape)
    flat, taken = values.detach().view(-1), 0
    for offsets, sizes in boxes(start, values.numel(), shape):
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        count = math.prod(sizes)
        yield box, MetadataIndex(name, box.offsets), flat[taken : taken + count].view(sizes)
        taken += count


class _Writer(dcp.FileSystemWriter):
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # torch's method would create the directory and its parents, even if the run was renamed a moment ago.
        return plan


class _SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self, staging: Staging | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staging = staging

    def create_local_plan(self) -> SavePlan:
        self.pieces: dict[MetadataIndex, Tensor] = {}
        items = []
        for name, held in self.state_dict.items():
            for box, index, piece in _pieces(name, held):
                self.pieces[index] = piece
                data = TensorWriteData(box, TensorProperties.create_from_tensor(piece), held.shape)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        pieces = {item.index: self.pieces[item.index] for item in plan.items}
        if self.staging is not None:
            self.pieces = self.staging.copy(pieces)
        else:
            # Give each view its own storage. DCP clones views and keeps every clone until the file is written.
            self.pieces = {index: from_dlpack(piece) for index, piece in pieces.items()}
        return plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index]


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The default method rebuilds tuples, and parts are tuples.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self.pieces: dict[MetadataIndex, Tensor] = {}
        items = []
        for name, held in self.state_dict.items():
            described = self.metadata.state_dict_metadata[name]
            if not isinstance(described, TensorStorageMetadata) or described.size != held.shape:
                raise ValueError(f"{name} is not a tensor of shape {tuple(held.shape)}")
            found = list(_pieces(name, held))
            self.pieces |= {index: piece for _, index, piece in found}
            items += create_read_items_for_chunk_list(name, described, [box for box, *_ in found])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index]


class Reader(dcp.FileSystemReader):
    """Reader of a directory in many passes. The description, which takes seconds for many ranks, is read once.

    The contents are not trusted: names must lie inside the directory, sizes must be those of its files, and a tensor
    must have the shape and type of its description.
    """

    @cached_property
    def described(self) -> Metadata:
        """Return the verified description. Raises CheckpointError."""
        folder = Path(self.path)
        try:
            content = Folder(folder).read(".metadata", _DESCRIPTION_BYTES)
            _check_memo(content)
            found = _Unpickler(io.BytesIO(content)).load()
            _verify(found, folder)
        except MemoryError:
            raise
        except Exception as error:  # A forged pickle can raise anything.
            said = printable(" ".join(str(error).split()))[:300] or type(error).__name__
            raise CheckpointError(f"{folder / '.metadata'} describes no checkpoint: {said}") from error
        assert isinstance(found, Metadata)
        return found

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.described

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with os.fdopen(Folder(Path(self.path)).open(name, os.O_RDONLY), "rb") as file:
                for item in items:
                    piece = self._piece(file, item.storage_index)
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        piece = piece.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, file: Any, index: MetadataIndex) -> Tensor:
        """Return one stored box of a tensor."""
        of = self.described.state_dict_metadata[index.fqn]
        assert isinstance(of, TensorStorageMetadata) and index.offset is not None
        sizes = next(chunk.sizes for chunk in of.chunks if chunk.offsets == index.offset)
        place = self.storage_data[index]
        part = _Part(file, place.offset, place.length)
        with zipfile.ZipFile(part) as archive:
            # torch's reader would decompress an entry to any size.
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError(f"{index.fqn} in {place.relative_path} is compressed")
        part.seek(0)
        piece = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
        if not isinstance(piece, Tensor) or piece.shape != sizes or piece.dtype != of.properties.dtype:
            raise ValueError(f"{index.fqn} in {place.relative_path} is not what .metadata says")
        return piece


class _Part(io.RawIOBase):
    """A range of a file, as a file object. (zipfile cannot read torch's own class for this.)"""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, "a place before the beginning")
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count: int = self._file.readinto(wanted)
        self._at += count
        return count


def _verify(found: Any, folder: Path) -> None:
    """Raise ValueError if a description does not describe tensors in the files of `folder`."""
    if not isinstance(found, Metadata):
        raise ValueError("it is something else")
    tensors, places = found.state_dict_metadata, found.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise ValueError("it lists no tensors")
    sizes: dict[str, int] = {}
    total = 0
    for name, of in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name of a tensor")
        if not isinstance(of, TensorStorageMetadata):
            continue  # Another tool stored this entry next to the tensors; it is never read here.
        if not _is_size(of.size) or not isinstance(of.properties, TensorProperties):
            raise ValueError(f"{name} has no size")
        if not isinstance(of.properties.dtype, torch.dtype) or not isinstance(of.chunks, list):
            raise ValueError(f"{name} has no type or no parts")
        held = 0
        for chunk in of.chunks:
            count = _verify_chunk(name, chunk, of.size) * of.properties.dtype.itemsize
            place = places.get(MetadataIndex(name, chunk.offsets))
            if not isinstance(place, _StorageInfo) or not is_inside(place.relative_path):
                raise ValueError(f"{name} lies in no file of the checkpoint")
            if place.relative_path not in sizes:
                file = os.lstat(folder / place.relative_path)
                if not stat.S_ISREG(file.st_mode):
                    raise ValueError(f"{place.relative_path} is no regular file")
                sizes[place.relative_path] = file.st_size
            is_whole = all(isinstance(n, int) and n >= 0 for n in (place.offset, place.length))
            if not is_whole or place.offset + place.length > sizes[place.relative_path] or count > place.length:
                raise ValueError(f"{name} does not fit into {place.relative_path}")
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{name} is stored in a transformed way")
            held += count
        if held != math.prod(of.size) * of.properties.dtype.itemsize:
            raise ValueError(f"the parts of {name} are not the whole of it")
        total += held
    if total > sum(sizes.values()):
        raise ValueError("its tensors are larger than its files")


def _verify_chunk(name: str, chunk: Any, whole: torch.Size) -> int:
    """Return the number of elements of a box of a tensor. Raises ValueError if it is not a box of the tensor."""
    if not isinstance(chunk, ChunkStorageMetadata) or not _is_size(chunk.offsets) or not _is_size(chunk.sizes):
        raise ValueError(f"{name} has a part without a place")
    if len(chunk.offsets) != len(whole) or len(chunk.sizes) != len(whole):
        raise ValueError(f"{name} has a part of other dimensions")
    if any(offset + size > side for offset, size, side in zip(chunk.offsets, chunk.sizes, whole)):
        raise ValueError(f"{name} has a part that lies outside of it")
    return math.prod(chunk.sizes)


def _is_size(found: Any) -> bool:
    return isinstance(found, torch.Size) and all(type(n) is int and n >= 0 for n in found)


def _check_memo(content: bytes) -> None:
    """Raise UnpicklingError if a pickle stores an object under a larger number than the objects before it have.

    The unpickler takes memory for all smaller numbers at once: 64 GB for a file of ten bytes.
    """
    stored = 0
    for opcode, number, _ in pickletools.genops(content):
        if opcode.name not in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            continue
        if number is not None and number > stored:  # MEMOIZE has no number: it takes the next one.
            raise pickle.UnpicklingError(f"it stores object {number} after {stored} others")
        stored += 1


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the description of a checkpoint")
