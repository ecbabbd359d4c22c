"""The base of every fused op: Triton where it is installed, the choice of implementation, the launch.

All launches go through `launch`, so that one place can watch them: `watching` hands each to a benchmark that counts its
traffic or compiles it for a GPU that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mimae.kernels import native
from mimae.kernels.native import OLDEST_CAPABILITY

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this system: every op runs in plain PyTorch
    triton = tl = None

Impl = Literal["auto", "native", "triton", "reference"]

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 was set before the import: kernels run on CPU tensors, slowly, for tests."""

if INTERPRETED:
    from mimae.kernels import interpreter

    interpreter.mend_bfloat16()

_preferred: Impl = "auto"


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`triton.jit` with its options, or the function itself where there is no triton: it is then never launched."""
    return function if triton is None else triton.jit(function, **options)


# Which implementation


def chosen(op: str, tensor: Tensor, impl: Impl = "auto") -> Literal["native", "triton", "reference"]:
    """The implementation of `op` for tensors like `tensor`. Raises ValueError where one is asked for in vain."""
    wanted = _preferred if impl == "auto" else impl
    if wanted == "auto":
        return "reference" if tensor.dtype == torch.float64 else _fastest(op, tensor.device)
    if wanted not in ("native", "triton", "reference"):
        raise ValueError(f"impl={wanted!r}: legal is auto, native, triton or reference")
    obstacle = {"native": native.obstacle(op, tensor.device), "triton": _obstacle(tensor.device)}.get(wanted)
    if wanted == "triton" and tensor.dtype == torch.float64:
        obstacle = "its kernels compute in float32"
    # A fake tensor has shapes alone: nothing runs.
    if obstacle is not None and not isinstance(tensor, FakeTensor):
        raise ValueError(f"{op} cannot run in {wanted} on {tensor.device}: {obstacle}")
    return wanted


def _fastest(op: str, device: torch.device) -> Literal["native", "triton", "reference"]:
    if native.obstacle(op, device) is None:
        return "native"
    # The interpreter is for tests, that ask for it by name.
    return "triton" if device.type == "cuda" and _obstacle(device) is None else "reference"


def reason(op: str, device: torch.device) -> str:
    """Return in words what `auto` chooses on a device, and what keeps it from a faster choice."""
    choice = _fastest(op, device)
    if choice == "native":
        return choice
    obstacles = [native.obstacle(op, device)] if op in native.OPS else []
    if choice == "reference":
        obstacles.append(_obstacle(device) or "triton's interpreter is for tests")
    return f"{choice}: {'; '.join(map(str, obstacles))}" if obstacles else choice


def _obstacle(device: torch.device) -> str | None:
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_CAPABILITY[0]}.0"
        return None
    return None if INTERPRETED else "no CUDA device"


@contextmanager
def prefer(impl: Impl) -> Iterator[None]:
    """Inside, ops that are called with impl="auto" run as `impl`."""
    global _preferred
    before, _preferred = _preferred, impl
    try:
        yield
    finally:
        _preferred = before


# Launching


class Target(NamedTuple):
    """Properties of a GPU that a launcher may fit its tiles to."""

    capability: int
    """Ten times the compute capability: 80, 90, 100."""
    processors: int
    """Streaming multiprocessors."""


H100 = Target(90, 132)


class Launch(NamedTuple):
    """One launch of a kernel: all parameters by name, and what the compiler is told."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_watch: Callable[[Launch], None] | None = None
_watched_target: Target = H100


@contextmanager
def watching(watch: Callable[[Launch], None], target: Target = H100) -> Iterator[None]:
    """Inside, `watch` sees every launch before it runs; with meta tensors it does not run. Launchers fit their tiles to
    `target` where the device of their tensors says nothing (meta tensors, the interpreter)."""
    global _watch, _watched_target
    before = _watch, _watched_target
    _watch, _watched_target = watch, target
    try:
        yield
    finally:
        _watch, _watched_target = before


def target_of(tensor: Tensor) -> Target:
    """The GPU that a kernel on `tensor` is launched on, or that is to be imagined."""
    if not tensor.is_cuda:
        return _watched_target
    properties = torch.cuda.get_device_properties(tensor.device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors and its current stream. Parameters go by name."""
    options = {"num_warps": warps, "num_stages": stages}
    if _watch is not None:
        _watch(Launch(kernel, grid, arguments, options))
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **options)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast wants the matrix products of tensors like `tensor`; outside of it, their own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
