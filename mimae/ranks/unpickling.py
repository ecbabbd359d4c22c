"""The types that torch's own collectives of objects may unpickle: descriptions of tensors, and errors.

DCP exchanges its plans in pickles. A peer that is none must not run code with them, so a run has torch read them by a
list of legal classes. mimae's own objects travel as JSON (`messages`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_LEGAL = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "torch.distributed.checkpoint.api": {"CheckpointException"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "traceback": {"FrameSummary", "StackSummary"},
}
"""Names that DCP's plans, results and errors need, by module; Python's own exceptions are legal too."""


class Unpickler(pickle.Unpickler):
    """Makes objects of the legal classes alone. Raises UnpicklingError for all others."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _LEGAL.get(module, ()):
            return super().find_class(module, name)
        if module == "builtins":
            found = super().find_class(module, name)
            if isinstance(found, type) and issubclass(found, BaseException):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a message between ranks")


@contextmanager
def restricted() -> Iterator[None]:
    """Have torch's collectives of objects read with `Unpickler` inside the block."""
    module = vars(dist.distributed_c10d)
    before = module["_unpickler"]
    module["_unpickler"] = Unpickler
    try:
        yield
    finally:
        module["_unpickler"] = before
