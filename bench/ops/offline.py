"""Machine code of kernels for other GPUs: registers, spills, shared memory, instructions.

`compiled` takes a launch as recorded by `runtime.watching`, with meta tensors of any size, specialises it by triton's
rules (dtypes, integers that are 1, alignment) and reads the machine code. With TRITON_INTERPRET there is no compiler,
so `machine_code` works in fresh processes. Results are kept in triton's cache, under the hash of the source. `python -m
mimae.bench.offline [OP ...]` prints those of the ops' kernels at production sizes, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimae.bench.ops.cases import chosen
from mimae.bench.ops.cases.case import Case, Size, recorded
from mimae.kernels import runtime
from mimae.kernels.runtime import H100, Launch, Target
from mimae.outside.progress import track


class Processor(NamedTuple):
    """Resources that the blocks of a streaming multiprocessor share (CUDA C++ Programming Guide)."""

    shared: int
    """Bytes of shared memory."""
    shared_of_block: int
    """Largest shared memory of a block, in bytes."""
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    tensor_columns: int = 0
    """Columns of tensor memory."""


PROCESSORS = {
    80: Processor(shared=164 << 10, shared_of_block=163 << 10),
    86: Processor(shared=100 << 10, shared_of_block=99 << 10, warps=48, blocks=16),
    89: Processor(shared=100 << 10, shared_of_block=99 << 10, warps=48, blocks=24),
    90: Processor(shared=228 << 10, shared_of_block=227 << 10),
    100: Processor(shared=228 << 10, shared_of_block=227 << 10, tensor_columns=512),
}
"""Limits by ten times the compute capability."""

TARGETS = (Target(80, 108), H100, Target(100, 148))
"""A100, H100, B200."""

_REGISTERS_AT_ONCE = 256
"""Granularity of the allocation of a warp's registers."""
_SHARED_OF_SYSTEM = 1024
"""Shared memory of a block in addition to its request, in bytes."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_DISASSEMBLY = "disassembly.txt"
_BULK = ("UTMALDG", "UTMASTG", "UBLKCP")
_GLOBAL = ("LDG", "STG", "LDGSTS", "ATOMG", "REDG", *_BULK)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Binary(NamedTuple):
    """A kernel as compiled for one architecture."""

    kernel: str
    capability: int
    warps: int
    registers: int
    """Registers of a thread."""
    local_bytes: int
    """Spilled bytes of a thread, which did not fit into registers."""
    shared_bytes: int
    """Shared memory of a block, in bytes."""
    tensor_columns: int
    matrix: dict[str, int]
    """Matrix instructions by kind: HMMA of one warp, HGMMA of four, UTCHMMA of tensor memory."""
    accesses: dict[int, int]
    """Instructions that access global memory, by the bytes a thread moves; a bulk copy counts as 16."""

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= PROCESSORS[self.capability].shared_of_block

    @property
    def blocks(self) -> int:
        """Return the number of blocks that fit on a multiprocessor at a time."""
        limits = PROCESSORS[self.capability]
        of_warp = -(-32 * self.registers // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
        bounds = [
            limits.blocks,
            limits.warps // self.warps,
            limits.registers // (of_warp * self.warps),
            limits.shared // (self.shared_bytes + _SHARED_OF_SYSTEM),
        ]
        if self.tensor_columns:
            bounds.append(limits.tensor_columns // self.tensor_columns)
        return min(bounds)

    @property
    def occupancy(self) -> float:
        """Return the warps of these blocks as a share of a multiprocessor's limit."""
        return self.blocks * self.warps / PROCESSORS[self.capability].warps

    @property
    def wide_share(self) -> float:
        """Return the share of bytes that the program's global accesses move in accesses of 128 bits and more."""
        moved = sum(width * count for width, count in self.accesses.items())
        return sum(width * count for width, count in self.accesses.items() if width >= 16) / moved if moved else 1.0

    def row(self) -> dict[str, Any]:
        """Return the figures and derived ones, for JSON."""
        derived = {"fits": self.fits, "blocks": self.blocks, "occupancy": self.occupancy, "wide_share": self.wide_share}
        return self._asdict() | derived


def compiled(launch: Launch, capability: int) -> Binary:
    """Compile a recorded launch for `capability`, one of PROCESSORS. Raises RuntimeError if triton interprets."""
    if runtime.INTERPRETED:
        raise RuntimeError("this process interprets kernels: compile in one without TRITON_INTERPRET")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    specialise = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, kinds, _ = specialise(**launch.arguments)
    places = {(place,): kind for place, kind in enumerate(kinds)}
    source = ASTSource(
        kernel,
        signature={name: kind for name, (kind, _) in zip(values, kinds)},
        constexprs={at: values[kernel.arg_names[at[0]]] for at, (kind, _) in places.items() if kind == "constexpr"},
        attrs={at: backend.parse_attr(hint) for at, (_, hint) in places.items() if isinstance(hint, str)},
    )
    binary = compile(source, target=target, options=launch.options)
    text = _disassembly(binary.hash, binary.asm["cubin"])
    resources = _RESOURCES.search(text)
    assert resources is not None, f"cuobjdump told no resources of {kernel.__name__}: {text[:500]}"
    registers, stack, local = map(int, resources.groups())
    instructions = [name.split(".") for name in _INSTRUCTION.findall(text)]
    return Binary(
        kernel=kernel.__name__,
        capability=capability,
        warps=binary.metadata.num_warps,
        registers=registers,
        local_bytes=stack + local,
        shared_bytes=binary.metadata.shared,
        tensor_columns=binary.metadata.tmem_size or 0,
        matrix=dict(Counter(name for name, *_ in instructions if name.endswith("MMA"))),
        accesses=dict(Counter(_width(name, marks) for name, *marks in instructions if name in _GLOBAL)),
    )


def machine_code(
    cases: Sequence[Case],
    processes: int = 2,
    targets: Sequence[Target] = TARGETS,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """Return the binaries of the cases' kernels at each size for each target. `keep` gets those so far, time and again.

    An entry is `Binary.row` with op and size, or has `error` in place of the figures.
    """
    jobs = [(case.op, size, target) for case in cases for size in case.sizes for target in targets]
    found: list[dict[str, Any]] = []
    with fresh_processes(processes, interpret=False) as pool:
        for (op, size, _), rows in zip(jobs, track(pool.map(_rows, *zip(*jobs)), "machine code", len(jobs))):
            found += [{"op": op, "size": size.name, **row} for row in rows]
            keep(found)
    return found


def _rows(op: str, size: Size, target: Target) -> list[dict[str, Any]]:
    """Return the machine code of all kernels of a case, each variant once. Failed compilations have `error`."""
    (case,) = chosen([op])
    inputs = case.inputs(size, size.batch, torch.device("meta"))
    found: list[dict[str, Any]] = []
    for fused in case.passes:
        for launch in recorded(fused, inputs, target)[0]:
            try:
                row = compiled(launch, target.capability).row()
            except Exception as error:  # triton and ptxas may raise anything.
                said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                row = {"kernel": launch.kernel.__name__, "capability": target.capability, "error": said}
            if row not in found:
                found.append(row)
    return found


def _disassembly(key: str, cubin: bytes) -> str:
    """Return the resources and machine code of a binary as text, which is kept next to it in triton's cache."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(key)
    if (file := cache.get_file(_DISASSEMBLY)) is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as written:
            written.write(cubin)
            written.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", written.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        file = cache.put(text, _DISASSEMBLY, binary=False)
    return Path(file).read_text()


def _width(name: str, marks: list[str]) -> int:
    if name in _BULK:
        return 16
    return next((_WIDTHS[mark] for mark in marks if mark in _WIDTHS), 4)


@contextmanager
def fresh_processes(count: int, interpret: bool) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes in which triton interprets or compiles kernels, independently of this process."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    try:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if __name__ == "__main__":
    print(json.dumps(machine_code(chosen(sys.argv[1:])), indent=2))
