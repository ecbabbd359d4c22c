"""Bytes that a computation moves between the GPU's memory and its processors, counted without a GPU.

A triton kernel is counted in the interpreter: what its loads and stores ask for (issued: masked lanes excepted), and
how many different bytes that is. Plain PyTorch is counted by operator: each reads its inputs and writes its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimae.kernels import runtime
from mimae.kernels.runtime import H100, Launch, Target


class Traffic(NamedTuple):
    """Issued and unique bytes."""

    loaded: int = 0
    stored: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0

    @property
    def issued(self) -> int:
        return self.loaded + self.stored

    @property
    def unique(self) -> int:
        return self.unique_loaded + self.unique_stored


def total(parts: Iterable[Traffic]) -> Traffic:
    return Traffic(*map(sum, zip(*parts))) if (parts := list(parts)) else Traffic()


class Counted:
    """A launch and its traffic by argument, which is counted while the launch runs."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._regions = []
        seen: set[int] = set()
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor) and (base := value.untyped_storage().data_ptr()) not in seen:
                seen.add(base)
                self._regions.append(_Region(name, base, value.untyped_storage().nbytes()))

    def count(self, access: str, pointers: Any, mask: Any) -> None:
        """Add a load or store of the elements at `pointers` (triton's handles) where `mask` holds."""
        item = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # The interpreter also uses integers as masks.
        held = numpy.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)
        addresses = pointers.data.ravel()
        if not held.all():
            addresses = addresses[held]
        if not addresses.size:
            return
        low, high = addresses.min(), addresses.max()
        region = next((each for each in self._regions if each.base <= low and high < each.base + each.size), None)
        assert region is not None, f"{self.launch.kernel.__name__}: a {access} that is not of one argument"
        region.count(access, addresses - region.base, item)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Return the bytes by argument. Arguments that share storage count under the first of them."""
        return {region.name: region.traffic for region in self._regions}


class _Region:
    """Storage of an argument, with marks on the elements that were loaded or stored."""

    def __init__(self, name: str, base: int, size: int) -> None:
        self.name, self.base, self.size = name, base, size
        self._issued = {"load": 0, "store": 0}
        self._marks = {access: numpy.zeros(size, numpy.int8) for access in self._issued}

    def count(self, access: str, offsets: Any, item: int) -> None:
        self._issued[access] += offsets.size * item
        self._marks[access][offsets] = item

    @property
    def traffic(self) -> Traffic:
        different = (int(marks.sum(dtype=numpy.int64)) for marks in self._marks.values())
        return Traffic(*self._issued.values(), *different)


@contextmanager
def counting(target: Target = H100) -> Iterator[list[Counted]]:
    """Count the launches inside the block in order, while the interpreter runs them; launchers see `target`.

    Matrix products are skipped, because their results move no bytes by themselves. Raises RuntimeError if triton does
    not interpret.
    """
    if not runtime.INTERPRETED:
        raise RuntimeError("traffic is counted under TRITON_INTERPRET=1")
    from triton.runtime.interpreter import InterpreterBuilder

    launches: list[Counted] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].count("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].count("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def no_dot(self: Any, left: Any, right: Any, accumulator: Any, *rest: Any) -> Any:
        return accumulator

    def no_atomics(self: Any, *rest: Any) -> Any:
        raise RuntimeError("atomic accesses are not counted")

    replacements = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_dot": no_dot,
        "create_atomic_rmw": no_atomics,
        "create_atomic_cas": no_atomics,
    }
    originals = {name: getattr(InterpreterBuilder, name) for name in replacements}
    _replace(InterpreterBuilder, replacements)
    try:
        with runtime.watching(lambda launch: launches.append(Counted(launch)), target):
            yield launches
    finally:
        _replace(InterpreterBuilder, originals)


def _replace(owner: Any, methods: Mapping[str, Any]) -> None:
    for name, method in methods.items():
        setattr(owner, name, method)


_OVERWRITING = {"aten::copy_", "aten::fill_", "aten::zero_"}
_ALLOCATING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_GATHERING = {"aten::gather", "aten::index", "aten::index_select", "aten::embedding", "aten::take"}


class TorchTraffic(TorchDispatchMode):
    """Counter of the bytes that PyTorch's operators move: each reads its inputs once and writes its outputs once.

    Views and allocations cost nothing. An expanded tensor counts with its memory, and the source of a gather with at
    most the size of the result. It also works on fake and meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.operators = self.largest = 0

    @property
    def moved(self) -> int:
        return self.read + self.written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _ALLOCATING:
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        storages = {_storage(each) for each in inputs}
        fresh = [each for each in outputs if _storage(each) not in storages]
        updated = [
            value
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        written = sum(map(_bytes, fresh)) + sum(map(_bytes, updated))
        if not written:
            return result
        read = sum({_identity(each): _bytes(each) for each in inputs}.values())
        if name in _GATHERING:
            read += min(written - _bytes(inputs[0]), 0)
        if name in _OVERWRITING:
            read -= _bytes(inputs[0])
        self.read += read
        self.written += written
        self.operators += 1
        self.largest = max([self.largest, *map(_bytes, fresh)])
        return result


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor's elements take in memory; an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
