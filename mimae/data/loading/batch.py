"""What a loader hands to the training loop, and the account of the samples that it could not read."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from mimae.errors import UserError
from mimae.outside.files import Folder
from mimae.outside.text import printable, say


class DataError(UserError):
    """The data cannot be used as asked; the text says what was found, what is legal and what to do."""


class BadSample(NamedTuple):
    """A sample that could not be read: its id, its file and why."""

    id: int
    path: str
    reason: str


class Spent(NamedTuple):
    """Seconds that went into a batch in the process that made it, by the wall clock; 0 where not told apart."""

    read: float = 0.0
    decode: float = 0.0
    resize: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Images stay uint8 until the first op that computes with them."""

    images: Tensor
    """uint8 (B, H, W, 3), contiguous."""
    sample_ids: Tensor
    """int64 (B,): the slots' ids, which crop, flip and mask go by; modulo the size of the source, their samples'."""
    source_ids: Tensor
    """int64 (B,): whose pixels they are; another sample's where a bad one was replaced."""
    epoch: int
    step: int
    """Optimizer step within the epoch."""
    bad: list[BadSample] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory the copy runs beside the host."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            source_ids=self.source_ids.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by torch's DataLoader."""
        return replace(
            self,
            images=self.images.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
            source_ids=self.source_ids.pin_memory(),
        )


class BadSamples:
    """The list of unreadable samples of a run, shared by its ranks through one file, each id once.

    `total` is the size of the data set; past `max_fraction` of it the run has to stop.
    """

    def __init__(self, path: Path, total: int, max_fraction: float) -> None:
        self.path, self.total, self.max_fraction = path, total, max_fraction
        self._known: set[int] = set()
        self._read_to = 0
        self._is_lost = False

    def record(self, bad: Iterable[BadSample]) -> None:
        """Appends the samples that no rank has listed yet. Raises DataError past the legal share."""
        new = [sample for sample in bad if sample.id not in self._known]
        if not new:
            return
        try:
            self._append(new)
        except OSError as error:  # A full disk costs lines of the list, not the run.
            if not self._is_lost:
                say(f"{self.path} cannot be written: {error.strerror}; the run goes on")
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
        """Add the samples that no rank has listed yet. Raises OSError."""
        with _opened(self.path) as file:
            # Under the lock, reading what others wrote and appending are one step: no id is listed twice.
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
    """Return a file of the run, to be read and added to. Raises OSError for a link, which is not followed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    return os.fdopen(Folder(path.parent).open(path.name, flags), "a+b")


def _line(sample: BadSample) -> bytes:
    """The sample as JSON in which nothing is left that a terminal would obey; parsed, its path has the same bytes."""
    text = json.dumps(sample._asdict(), ensure_ascii=False)
    return ("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text) + "\n").encode()


def _ids(lines: Iterable[bytes]) -> Iterator[int]:
    """The ids of a list; a line that a full disk or a crash tore counts for nothing."""
    for line in lines:
        try:
            yield json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            continue
