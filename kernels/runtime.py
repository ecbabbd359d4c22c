"""Base of the fused ops: optional Triton, the choice of an implementation, and the launch.

All launches use `launch`, so that they can be observed in one place: `watching` passes each to a benchmark, which
counts its traffic or compiles it for a GPU that this machine lacks.
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
except ImportError:  # There are no wheels for this system: every op runs in plain PyTorch.
    triton = tl = None

Impl = Literal["auto", "native", "triton", "reference"]

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""True if TRITON_INTERPRET=1 was set before the import: kernels run on CPU tensors, slowly, for tests."""

if INTERPRETED:
    from mimae.kernels import interpreter

    interpreter.mend_bfloat16()

_preferred: Impl = "auto"


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Apply `triton.jit` with its options. Without triton, return the function itself, which is then never launched."""
    return function if triton is None else triton.jit(function, **options)


# Which implementation


def chosen(op: str, tensor: Tensor, impl: Impl = "auto") -> Literal["native", "triton", "reference"]:
    """Return the implementation of `op` for tensors like `tensor`.

    Raises ValueError if the requested one cannot run.
    """
    wanted = _preferred if impl == "auto" else impl
    if wanted == "auto":
        return "reference" if tensor.dtype == torch.float64 else _fastest(op, tensor.device)
    if wanted not in ("native", "triton", "reference"):
        raise ValueError(f"impl={wanted!r}: legal is auto, native, triton or reference")
    obstacle = {"native": native.obstacle(op, tensor.device), "triton": _obstacle(tensor.device)}.get(wanted)
    if wanted == "triton" and tensor.dtype == torch.float64:
        obstacle = "its kernels compute in float32"
    # A fake tensor has only a shape: no code runs.
    if obstacle is not None and not isinstance(tensor, FakeTensor):
        raise ValueError(f"{op} cannot run in {wanted} on {tensor.device}: {obstacle}")
    return wanted


def _fastest(op: str, device: torch.device) -> Literal["native", "triton", "reference"]:
    if native.obstacle(op, device) is None:
        return "native"
    # The interpreter is for tests, which request it by name.
    return "triton" if device.type == "cuda" and _obstacle(device) is None else "reference"


def reason(op: str, device: torch.device) -> str:
    """Return a text with the choice of `auto` on a device, and the obstacles to a faster one."""
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
    """Run ops that are called with impl="auto" as `impl` inside the block."""
    global _preferred
    before, _preferred = _preferred, impl
    try:
        yield
    finally:
        _preferred = before


# Launching


class Target(NamedTuple):
    """Properties of a GPU to which launchers fit their tiles."""

    capability: int
    """Ten times the compute capability: 80, 90, 100."""
    processors: int
    """Number of streaming multiprocessors."""


H100 = Target(90, 132)


class Launch(NamedTuple):
    """One launch of a kernel: all parameters by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_watch: Callable[[Launch], None] | None = None
_watched_target: Target = H100


@contextmanager
def watching(watch: Callable[[Launch], None], target: Target = H100) -> Iterator[None]:
    """Call `watch` for every launch inside the block before it runs; with meta tensors it does not run.

    Launchers fit their tiles to `target` if the device of their tensors is not a GPU (meta tensors, the interpreter).
    """
    global _watch, _watched_target
    before = _watch, _watched_target
    _watch, _watched_target = watch, target
    try:
        yield
    finally:
        _watch, _watched_target = before


def target_of(tensor: Tensor) -> Target:
    """Return the GPU on which a kernel on `tensor` is launched, or the assumed one."""
    if not tensor.is_cuda:
        return _watched_target
    properties = torch.cuda.get_device_properties(tensor.device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors and its current stream. Parameters are passed by name."""
    options = {"num_warps": warps, "num_stages": stages}
    if _watch is not None:
        _watch(Launch(kernel, grid, arguments, options))
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **options)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return autocast's dtype for matrix products of tensors like `tensor`, or their own dtype outside autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
