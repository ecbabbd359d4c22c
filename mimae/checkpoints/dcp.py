"""A checkpoint's tensors in the format of torch.distributed.checkpoint (DCP): each rank writes and reads its parts.

DCP stores boxes of a tensor. A part is a range of its elements, so at most a few boxes, and what one engine on so many
ranks wrote another reads on any number of them, with DCP's own tools too. Its `.metadata` is a pickle, from which
nothing is made here but what describes tensors; the tensors are loaded with weights_only.
"""

from __future__ import annotations

import math
import pickle
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.utils.dlpack import from_dlpack

from mimae.distributed import Group
from mimae.randomness import Part

State = Mapping[str, "Tensor | Part"]
"""By name what this rank holds: tensors that are the same on every rank, and parts."""

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
"""By module, all that a `.metadata` may name."""


def boxes(start: int, length: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that hold elements start .. start + length - 1 of a tensor, in their order."""
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
    """Writes the state of all ranks of `group` into the directory `path`, once what several of them hold.

    A collective. With `staging` what this rank writes is copied there first. Raises CheckpointException on every rank.
    """
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(path), planner=_SavePlanner(staging), process_group=group)


def load(path: Path | Reader, state: State) -> None:
    """Reads into the tensors of `state` what `path` holds of them. Raises KeyError for what it lacks."""
    reader = path if isinstance(path, Reader) else Reader(path)
    missing = sorted(state.keys() - reader.described.state_dict_metadata.keys())
    if missing:
        raise KeyError(f"{reader.path} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        dcp.load(dict(state), storage_reader=reader, planner=_LoadPlanner(), no_dist=True)


def load_whole(path: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, by the rest of their names."""
    reader = Reader(path)
    state = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in reader.described.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(of, TensorStorageMetadata)
    }
    load(reader, state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def num_bytes(state: State) -> int:
    """Bytes of the whole tensors."""
    return sum(
        of.shape.numel() * of.values.element_size() if isinstance(of, Part) else of.nbytes for of in state.values()
    )


def reason(error: BaseException) -> str:
    """What DCP's exception, which holds every rank's with its traceback, says first."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause}"
    return str(error)


class Staging:
    """Copies on the host of what this rank writes, beside what it computes. Their memory is kept for the next save."""

    def __init__(self, device: torch.device) -> None:
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done = threading.Event()
        self._done.set()

    def begin(self) -> None:
        """What the device has been given until now comes before the copies."""
        self._done.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, pieces: Mapping[MetadataIndex, Tensor]) -> dict[MetadataIndex, Tensor]:
        """Copies of `pieces`; from now on they may change."""
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
        """There is nothing to copy any more."""
        self._done.set()

    @property
    def is_settled(self) -> bool:
        """Whether `settle` would not wait."""
        return self._done.is_set()

    def settle(self) -> None:
        """Waits until what is to be copied may change."""
        self._done.wait()


def _pieces(name: str, held: Tensor | Part) -> Iterator[tuple[ChunkStorageMetadata, MetadataIndex, Tensor]]:
    """The boxes of what this rank holds of a tensor, and views of them."""
    values, start, shape = held if isinstance(held, Part) else Part(held, 0, held.shape)
    flat, taken = values.detach().view(-1), 0
    for offsets, sizes in boxes(start, values.numel(), shape):
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        count = math.prod(sizes)
        yield box, MetadataIndex(name, box.offsets), flat[taken : taken + count].view(sizes)
        taken += count


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
            # As tensors that have their memory to themselves: of what lies inside of another one DCP makes a copy, and
            # keeps all of them until the file is written.
            self.pieces = {index: from_dlpack(piece) for index, piece in pieces.items()}
        return plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index]


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The default one rebuilds tuples, which parts are.
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
    """Of a directory that is read in many turns: what describes it, seconds of reading for many ranks, is read once."""

    @cached_property
    def described(self) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.described


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the description of a checkpoint")
