"""Bytes that a transformer block reads and writes in a forward and a backward in bf16, counted on a CPU.

An operator that runs by itself reads its inputs and writes its results. A kernel that torch's compiler makes of several
operators reads and writes only what enters and leaves it; the compiler fuses here as it does for a CPU.

This file is also a script. It counts for the version of this package that is on PYTHONPATH, and needs only its `Block`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

import mimae
from mimae.errors import UserError
from mimae.model.blocks import Block

Part: TypeAlias = Literal["block", "attention", "mlp"]
"""A whole block, or one of its halves: a norm, attention or MLP, and the sum with the residual stream."""

KINDS = ("products", "attention", "other")
"""Matrix products; attention; all else: norms, GELU, sums, casts, gradients of biases."""

SEQUENCES = 512
"""Number of sequences. It is large enough that the parameters are less than 1 % of what is moved."""


class Way(NamedTuple):
    """A block, and how it runs."""

    part: Part = "block"
    compiled: bool = True
    checkpointing: str = "none"
    residual: str = "fp32"
    width: int = 192
    heads: int = 3
    tokens: int = 50


def count(way: Way, checkout: Path | None = None) -> dict[str, float]:
    """Return the bytes that each token and channel moves, by kind, in this version or in that of a checkout.

    Each count has a process of its own, because torch's compiler keeps what it has compiled.
    """
    root = Path(mimae.__file__).parents[1] if checkout is None else checkout
    environment = {
        **os.environ,
        "PYTHONPATH": str(root.absolute()),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_LOGS": "inductor_metrics",  # torch counts the bytes of its kernels only if it logs them.
    }
    script = [sys.executable, __file__, json.dumps(way._asdict())]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the block of {root} cannot be counted: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


class _Part(nn.Module):
    def __init__(self, block: Block, part: Part) -> None:
        super().__init__()
        self.block, self.part = block, part

    def forward(self, tokens: Tensor) -> Tensor:
        block = self.block
        if self.part == "attention":
            return tokens + block.attn(block.norm1(tokens))
        if self.part == "mlp":
            return tokens + block.mlp(block.norm2(tokens))
        whole: Tensor = block(tokens)
        return whole


def counted(way: Way) -> dict[str, float]:
    """Return what `count` returns, for this process's version of the block."""
    found = _by_compiled_kernel(way) if way.compiled else _by_operator(way)
    return {kind: found[kind] / (SEQUENCES * way.tokens * way.width) for kind in KINDS}


def _step(way: Way) -> Callable[[], None]:
    """Return a function that runs a forward and a backward, whose inputs exist."""
    part = _Part(Block(way.width, way.heads, "sdpa"), way.part)
    if way.compiled:
        part.compile(dynamic=False)
    stream = torch.bfloat16 if way.residual == "bf16" else torch.float32
    tokens = torch.randn(SEQUENCES, way.tokens, way.width, dtype=stream, requires_grad=True)
    gradient = torch.ones_like(tokens)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = part(tokens) if way.checkpointing == "none" else _recomputing(part, way.checkpointing, tokens)
        out.backward(gradient)

    return step


def _recomputing(part: nn.Module, how: Any, tokens: Tensor) -> Tensor:
    """Run a part of a block with the checkpointing of this version; older ones may have none."""
    from mimae.model.recomputation import BUDGET, call

    functorch.activation_memory_budget = BUDGET
    return call(part, how, tokens)


# Operator by operator


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        read, written = _tensors(args), _tensors(out)
        known = {tensor.untyped_storage().data_ptr() for tensor in read}
        # A view has the memory of its input.
        if func._schema.is_mutable or not all(each.untyped_storage().data_ptr() in known for each in written):
            self.bytes[kind_of(func.overloadpacket.__name__)] += sum(map(_size, read + written))
        return out


def _by_operator(way: Way) -> Mapping[str, int]:
    step = _step(way)
    with _Operators() as operators:
        step()
    return operators.bytes


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, list | tuple) else []


def _size(tensor: Tensor) -> int:
    """Bytes of the distinct numbers of a tensor: one that is expanded repeats its own."""
    distinct = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(distinct).numel()) * tensor.itemsize


def kind_of(operator: str) -> str:
    """Return the kind of an operator or of a kernel by its name."""
    if "attention" in operator:
        return "attention"
    return "products" if operator.rpartition(".")[2] in ("mm", "addmm", "bmm", "baddbmm") else "other"


# Kernel by kernel


def _by_compiled_kernel(way: Way) -> Mapping[str, int]:
    _step(way)()
    found: Counter[str] = Counter()
    for node, numbers in metrics.nodes_num_elem:  # numbers of 4 bytes
        found[kind_of(_name(node))] += 4 * numbers
    return found


def _name(node: Any) -> str:
    """Return the name of the operator that a kernel calls; empty for a kernel that the compiler made."""
    return getattr(node.node, "python_kernel_name", None) or ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(counted(Way(**json.loads(sys.argv[1])))))
