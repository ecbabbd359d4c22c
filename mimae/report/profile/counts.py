"""FLOPs and bytes of a step by phase, counted for each operator while a step runs.

A multiply-add counts as two FLOPs. Norms, softmax and element-wise operators count as zero, as in the planner. The
bytes of an operator are those of its input and output tensors: its memory traffic without any cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mimae.report.profile.marks import BACKWARD, FORWARD, STEP
from mimae.report.profile.phases import OTHER

_OUTER = (STEP, FORWARD, BACKWARD)


class Counts(TorchDispatchMode):
    """Counters by phase. `mark` names phases. A backward operator belongs to the phase that made its autograd node."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops: Counter[str] = Counter()
        self.backward_flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._open: list[str] = []
        self._edges: list[int] = []
        """Ascending sequence numbers of autograd at which another phase began; `_names` has those phases."""
        self._names: list[str] = []

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Assign the operators inside the block to the phase `name`."""
        self._enter(name)
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._enter(self._open[-1] if self._open else OTHER)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        phase, is_backward = self._phase()
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=made)
            (self.backward_flops if is_backward else self.forward_flops)[phase] += flops
        if not getattr(func, "is_view", False):
            self.bytes[phase] += sum(
                each.numel() * each.element_size()
                for each in tree_leaves((args, kwargs, made))
                if isinstance(each, Tensor)
            )
        return made

    def _enter(self, name: str) -> None:
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if self._edges and self._edges[-1] == number:
            self._names[-1] = name
        else:
            self._edges.append(number)
            self._names.append(name)

    def _phase(self) -> tuple[str, bool]:
        """Return the phase of the current operator, and True if it belongs to backward."""
        inner = self._open[-1] if self._open else OTHER
        if BACKWARD not in self._open:
            return OTHER if inner in _OUTER else inner, False
        if inner != BACKWARD:  # This is a forward that is recomputed.
            return inner, True
        node = torch._C._current_autograd_node()
        place = -1 if node is None else bisect_right(self._edges, node._sequence_nr()) - 1
        name = self._names[place] if place >= 0 else OTHER
        return OTHER if name in _OUTER else name, True
