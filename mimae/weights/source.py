"""Sources of weights: tensors by name, which are read when they are needed, and known facts about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mimae.checkpoints import dcp
from mimae.checkpoints.contents import Manifest
from mimae.randomness import Part


class Stored(Protocol):
    """A tensor in a file, which is not read into memory before it is copied."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def copy_to(self, values: Tensor, start: int) -> None:
        """Copy elements start .. start + n - 1 of the flattened tensor into `values` (n,)."""


class Mapped:
    """A tensor whose memory is mapped from a file, or one in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def copy_to(self, values: Tensor, start: int) -> None:
        values.copy_(self._tensor.flatten()[start : start + len(values)])


class Joined:
    """Tensors that are concatenated along their first dimension."""

    def __init__(self, tensors: Sequence[Stored]) -> None:
        """Concatenate `tensors`, whose shapes are equal except for the first dimension."""
        first = tensors[0].shape
        self._tensors, self.shape = tensors, torch.Size([sum(each.shape[0] for each in tensors), *first[1:]])
        self.dtype = next((each.dtype for each in tensors if not each.dtype.is_floating_point), tensors[0].dtype)

    def copy_to(self, values: Tensor, start: int) -> None:
        end, behind = start + len(values), 0
        for each in self._tensors:
            before, behind = behind, behind + prod(each.shape)
            first, last = max(start, before), min(end, behind)
            if first < last:
                each.copy_to(values[first - start : last - start], first - before)


class InCheckpoint:
    """A tensor of weights in a checkpoint of mimae."""

    dtype = torch.float32

    def __init__(self, reader: dcp.Reader, name: str, shape: torch.Size) -> None:
        self._reader, self._name, self.shape = reader, name, shape

    def copy_to(self, values: Tensor, start: int) -> None:
        dcp.load(self._reader, {self._name: Part(values, start, self.shape)})


def whole(stored: Stored) -> Tensor:
    """Return a whole tensor in fp32. It has to be small, because it is read into memory."""
    values = torch.empty(prod(stored.shape), device="cpu")
    stored.copy_to(values, 0)
    return values.view(stored.shape)


class Known(NamedTuple):
    """Facts that a source states about its weights, in addition to names and shapes. None means unknown."""

    heads: int | None = None
    decoder_heads: int | None = None
    norm_eps: float | None = None
    activation: str | None = None
    grid: tuple[int, int] | None = None
    """Rows and columns of the grid of patches."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalize_pixels: bool | None = None
    licence: str | None = None


class Source(NamedTuple):
    """Weights of a run or of another project."""

    name: str
    """Value of model.init."""
    kind: str
    """Description of the source as text."""
    tensors: Mapping[str, Stored]
    """Tensors by their names in the source."""
    known: Known
    files: Manifest
    """Size and SHA-256 of a checkpoint's files; empty if `paths` are not read yet."""
    paths: tuple[Path, ...]
    is_ours: bool = False
    """True for a run of mimae: all of its names are ours, also those outside encoder and decoder."""
