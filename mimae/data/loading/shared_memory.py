"""Results of worker processes, handed over in memory that they share with the process that reads them.

With a new block of shared memory for each tensor, both processes would pay for its pages. Here each worker writes into
slots of one block that exists before the workers start. A slot is used again when the reader has dropped all tensors in
it, so its pages are made once.

The block takes memory only where something was written, /dev/shm does not limit it, and nothing of it is left when the
processes end, however they end.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import resource
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from mimae.outside.text import say

SLOTS = 16
"""Slots of a worker, for the results that it makes ahead and those that the reader keeps. The first free slot
is taken, so that memory grows only to the largest number that was ever in use. It stays until the loader is closed."""

SLOT_BYTES = 1 << 32
"""Largest size of a result; what exceeds it goes through the pipe. These are addresses, not memory."""

SMALL = 1 << 16
"""Largest size of a tensor that is part of the message, in memory of its own. Such tensors, for example the numbers of
the samples, are often kept for longer than the images, and would keep the slot."""

_ALIGNED = 64
_NORESERVE = 0x4000
"""Linux's MAP_NORESERVE; Python has a name for it from 3.13 on."""

Place: TypeAlias = tuple[int | bytes, tuple[int, ...], torch.dtype]
"""A tensor in a message: its first byte in the slot or, if it is small, its bytes; its shape and its dtype."""


class Empty(Protocol):
    """Makes a tensor whose values are not set, as `torch.empty` does."""

    def __call__(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor: ...


def unshared(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """Return a tensor in this process's own memory whose values are not set."""
    return torch.empty(tuple(shape), dtype=dtype)


class Slots:
    """Memory for the results of `workers` processes that are forked from this process.

    There are no slots where the system grants no memory, under a limit of addresses, and for processes that are not
    forked. Results then go through pipes.
    """

    def __init__(self, workers: int) -> None:
        self._reader, self.key = os.getpid(), next(_numbers)
        # After the slots there is a byte for each, which the worker sets and the reader clears.
        self._marks = workers * SLOTS * SLOT_BYTES
        self._memory = _reserved(self._marks + workers * SLOTS) if workers else None
        _known[self.key] = self

    def __reduce__(self) -> tuple[type[Slots], tuple[int]]:
        return Slots, (0,)

    def free(self, worker: int) -> Slot | None:
        """Return a slot of a worker that nothing uses, if there is one.

        A process that was forked from the reader may have workers of its own, under the same numbers: they get none.
        """
        if self._memory is None or self._reader not in (os.getpid(), os.getppid()):
            return None
        numbers = range(worker * SLOTS, (worker + 1) * SLOTS)
        number = next((number for number in numbers if not self._memory[self._marks + number]), None)
        return None if number is None else Slot(self, number)

    def part(self, number: int) -> memoryview:
        """Return the memory of a slot. Tensors made of it hold a reference to this very object."""
        assert self._memory is not None
        return memoryview(self._memory)[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]

    def take(self, number: int) -> None:
        """Mark a slot as used, in the worker."""
        assert self._memory is not None
        self._memory[self._marks + number] = 1

    def received(self, number: int) -> memoryview:
        """Return the memory of a slot, in the reader. The slot is free again when no tensor refers to this object."""
        assert self._memory is not None
        part = self.part(number)
        weakref.finalize(part, _release, self._memory, self._marks + number, self._reader).atexit = False
        return part


def _release(memory: mmap.mmap, mark: int, reader: int) -> None:
    # A process that was forked from the reader has copies of its objects, and must not free what the reader uses.
    if os.getpid() == reader:
        memory[mark] = 0


def _reserved(size: int) -> mmap.mmap | None:
    """Return `size` bytes of addresses that this process shares with those that are forked from it."""
    # A program may still set another method for the processes that it starts itself, so nothing is set here.
    if (
        method := multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    ) != "fork":
        return _without(f"they are started by {method}, not by fork")
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        # The addresses would be taken from those that the run needs.
        return _without("a limit of addresses is set, see `ulimit -v`")
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NORESERVE)
    except OSError as error:
        return _without(error.strerror or str(error))
    memory.madvise(mmap.MADV_DONTDUMP)  # A core dump would look at every page of it.
    return memory


@lru_cache(1)
def _without(reason: str) -> None:
    """Say once why there is no shared memory."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(
            f"no memory can be shared with the decoding processes ({reason}): batches go through pipes, which takes "
            f"more CPU time",
            error=True,
        )


_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
"""Slots of this process by number. A forked process knows those of its parent by the same numbers."""


class Slot:
    """Memory for one result, in the worker that makes it."""

    def __init__(self, slots: Slots, number: int) -> None:
        self._slots, self._number, self._used = slots, number, 0
        self.name = slots.key, number
        """What the reader finds the slot by."""
        self._part = slots.part(number)
        self._first = torch.frombuffer(self._part, dtype=torch.uint8, count=1).data_ptr()

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """Return a tensor in the slot whose values are not set, or one in other memory if the slot is full."""
        found = self._next(tuple(shape), dtype)
        return unshared(shape, dtype=dtype) if found is None else found

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        count, begin = math.prod(shape), self._used
        end = begin + count * dtype.itemsize
        if count == 0 or end > SLOT_BYTES:
            return None
        self._used = -(-end // _ALIGNED) * _ALIGNED
        return torch.frombuffer(self._part, dtype=dtype, count=count, offset=begin).view(shape)

    def take(self) -> None:
        """Mark the slot as used. The reader frees it."""
        self._slots.take(self._number)

    def place(self, tensor: Tensor) -> Place | None:
        """Return the bytes of a small tensor, or the place of a larger one; None if the slot is full.

        A larger tensor is copied into the slot if it lies elsewhere.
        """
        if tensor.nbytes <= SMALL:
            flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
            return flat.view(torch.uint8).numpy().tobytes(), tuple(tensor.shape), tensor.dtype
        begin = tensor.data_ptr() - self._first
        if not (0 <= begin < self._used and tensor.is_contiguous()):
            copied = self._next(tuple(tensor.shape), tensor.dtype)
            if copied is None:
                return None
            begin = copied.copy_(tensor).data_ptr() - self._first
        return begin, tuple(tensor.shape), tensor.dtype


def handed_over(made: Any, slot: Slot | None) -> bytes:
    """Return the message with a worker's result, of any type. Its large tensors are in the slot, if there is one."""
    file = io.BytesIO()
    pickle.dump(None if slot is None else slot.name, file, pickle.HIGHEST_PROTOCOL)
    _Writer(file, slot).dump(made)
    if slot is not None:
        slot.take()
    return file.getvalue()


def arrived(message: bytes | bytearray) -> Any:
    """Return the result in a message of `handed_over`, in the reader."""
    file = io.BytesIO(message)
    name, part = pickle.load(file), None
    if name is not None:
        key, number = name
        part = _known[key].received(number)
    return _Reader(file, part).load()


def _is_plain(thing: Any) -> bool:
    return type(thing) is Tensor and thing.device.type == "cpu" and thing.layout == torch.strided


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, slot: Slot | None) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._slot = slot

    def persistent_id(self, thing: Any) -> Place | None:
        return self._slot.place(thing) if self._slot is not None and _is_plain(thing) else None


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, part: memoryview | None) -> None:
        super().__init__(file)
        self._part = part

    def persistent_load(self, place: Place) -> Tensor:
        found, shape, dtype = place
        if isinstance(found, bytes):
            return (torch.frombuffer(bytearray(found), dtype=dtype) if found else torch.empty(0, dtype=dtype)).view(
                shape
            )
        assert self._part is not None
        return torch.frombuffer(self._part, dtype=dtype, count=math.prod(shape), offset=found).view(shape)
