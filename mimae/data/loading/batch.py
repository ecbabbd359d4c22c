"""Micro-batches that a loader gives to the training loop, and the list of samples that it could not read."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from mimae.errors import UserError
from mimae.outside.files import Folder
from mimae.outside.text import printable, say


class DataError(UserError):
    """The data cannot be used as requested. The message says what was found, what is allowed and what to do."""


class BadSample(NamedTuple):
    """A sample that could not be read: its id, its path and the reason."""

    id: int
    path: str
    reason: str


class Spent(NamedTuple):
    """Wall-clock seconds that the process which made a batch spent on each part; 0 if the part was not measured."""

    read: float = 0.0
    decode: float = 0.0
    resize: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Images stay uint8 until the first operation that computes with them."""

    images: Tensor
    """uint8 (B, H, W, 3), contiguous."""
    sample_ids: Tensor
    """int64 (B,): slots, which determine crop, flip and mask. A slot modulo the source's size is the sample's id."""
    source_ids: Tensor
    """int64 (B,): ids of the samples whose pixels these are; they differ where a bad sample was replaced."""
    epoch: int
    step: int
    """Optimizer step within the epoch."""
    bad: list[BadSample] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    targets: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that a task's `Reader` made beside the images, by name: each (B, ...)."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`. From pinned memory the copy is asynchronous to the host."""
        return self.with_tensors({name: t.to(device, non_blocking=True) for name, t in self.tensors().items()})

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a copy to a GPU is asynchronous."""
        return self.with_tensors({name: tensor.pin_memory() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batch by name."""
        own = {"images": self.images, "sample_ids": self.sample_ids, "source_ids": self.source_ids}
        return own | {f"targets.{name}": target for name, target in self.targets.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Batch:
        """Return the batch with other tensors, by the names that `tensors` gives."""
        return replace(
            self,
            images=tensors["images"],
            sample_ids=tensors["sample_ids"],
            source_ids=tensors["source_ids"],
            targets={name: tensors[f"targets.{name}"] for name in self.targets},
        )


class BadSamples:
    """List of the unreadable samples of a run, each id once. All ranks share it through one file.

    `total` is the size of the data set. The run stops when more than `max_fraction` of it is listed.
    """

    def __init__(self, path: Path, total: int, max_fraction: float) -> None:
        self.path, self.total, self.max_fraction = path, total, max_fraction
        self._known: set[int] = set()
        self._read_to = 0
        self._is_lost = False

    def record(self, bad: Iterable[BadSample]) -> None:
        """Append the samples that no rank has listed yet. Raises DataError if more than `max_fraction` are listed."""
        new = [sample for sample in bad if sample.id not in self._known]
        if not new:
            return
        try:
            self._append(new)
        except OSError as error:  # A full disk loses lines of the list but does not stop the run.
            if not self._is_lost:
                say(f"{self.path} cannot be written: {error.strerror}; the run continues")
            self._is_lost = True
        self._known.update(sample.id for sample in new)
        if len(self._known) > self.max_fraction * self.total:
            shown = "\n".join(f"  {printable(sample.path)}: {printable(sample.reason)}" for sample in new[:10])
            raise DataError(
                f"{len(self._known)} of {self.total} samples cannot be read, more than "
                f"data.max_bad_fraction = {self.max_fraction} allows; the latest:\n{shown}\n"
                f"All are listed in {self.path}. Mend or remove them, or raise data.max_bad_fraction."
            )

    def _append(self, new: list[BadSample]) -> None:
        """Append the samples that no rank has listed yet. Raises OSError."""
        with _opened(self.path) as file:
            # The lock makes reading the other ranks' lines and appending atomic, so no id is listed twice.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_to)
            self._known.update(_ids(file))
            for sample in new:
                if sample.id not in self._known:
                    self._known.add(sample.id)
                    file.write(_line(sample))
            file.flush()
            self._read_to = file.tell()


def _opened(path: Path) -> BinaryIO:
    """Open a file of the run for reading and appending. Links are not followed: they raise OSError."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    return os.fdopen(Folder(path.parent).open(path.name, flags), "a+b")


def _line(sample: BadSample) -> bytes:
    """Return the sample as a line of JSON without terminal control characters. Parsing it restores the path."""
    text = json.dumps(sample._asdict(), ensure_ascii=False)
    return ("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text) + "\n").encode()


def _ids(lines: Iterable[bytes]) -> Iterator[int]:
    """Yield the ids of a list. Lines that a full disk or a crash truncated are skipped."""
    for line in lines:
        try:
            yield json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            continue
